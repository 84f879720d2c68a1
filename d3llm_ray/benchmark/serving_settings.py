"""Settings of `d3llm-ray benchmark serve`: a served model, and the loads that it is put under."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, ValidationInfo, field_validator

from d3llm_ray.benchmark.serving_load import Bounds, ClosedLoad, Load, OpenLoad
from d3llm_ray.errors import require
from d3llm_ray.serving.client_key import client_key
from d3llm_ray.serving.settings import ServeSettings
from d3llm_ray.tasks import Split


class ServeBenchmarkSettings(ServeSettings):
    """Measure what users see of a served model; its settings are those of `d3llm-ray serve`."""

    verb: ClassVar[str] = "benchmark serve"

    port: int = Field(0, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    url: str | None = Field(
        None, pattern=r"^https?://", description="server that runs already, without /v1; null: one is started here"
    )
    api_key_file: Path | None = Field(
        None, description="file with the key for `url`; null: from D3LLM_RAY_API_KEY or OPENAI_API_KEY, where set"
    )
    prompts: str = Field("arith", description="embedded task, file or folder of files, or a dataset of the Hub")
    split: Split = Field("test", description="split of the prompts")
    concurrency: tuple[int, ...] = Field((1, 4, 16), description="closed loads: clients that ask one after another")
    rates: tuple[float, ...] = Field((), description="open loads: requests a second, at random times (Poisson)")
    requests: int = Field(100, gt=0, description="requests of a load in a round")
    seconds: float = Field(60.0, gt=0, allow_inf_nan=False, description="after which a load in a round sends no more")
    rounds: int = Field(3, gt=0, description="times that every load is measured")
    warm_up: int = Field(16, ge=0, description="requests before each load that are not measured")
    stream: bool = Field(True, description="ask for streams; without, there is no time to the first text")
    timeout_s: float = Field(60.0, gt=0, allow_inf_nan=False, description="seconds after which an answer is given up")
    slo_first_s: float = Field(1.0, gt=0, allow_inf_nan=False, description="SLO: seconds to the first text at most")
    slo_total_s: float = Field(5.0, gt=0, allow_inf_nan=False, description="SLO: seconds to the end at most")
    offline: bool = Field(True, description="also measure the engine without a server, and compare every answer")
    compared: int = Field(
        100, ge=0, description="answers, not measured, of which every token is compared with the offline one; 0: none"
    )
    seed: int = Field(0, ge=0, description="of the random arrivals")
    output: Path = Field(Path("runs/benchmark-serve"), description="folder of the report")

    @field_validator("concurrency", "rates")
    @classmethod
    def _positive(cls, loads: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        require(all(load > 0 for load in loads), info.field_name or "", loads, "positive numbers")
        return loads

    @property
    def loads(self) -> list[Load]:
        """All loads, lightest first in each kind."""
        closed = [ClosedLoad(clients) for clients in sorted(set(self.concurrency))]
        return [*closed, *(OpenLoad(rate, self.seed) for rate in sorted(set(self.rates)))]

    @property
    def bounds(self) -> Bounds:
        """Of a load in a round."""
        return Bounds(self.requests, self.seconds)

    def at_once(self, clients: int) -> int:
        """Requests of so many clients that one engine decodes at a time."""
        return min(clients, self.max_batch_size)

    def api_key(self) -> str | None:
        """What requests are sent with; `InputError` for a file that does not hold one key."""
        return client_key(self.api_key_file)

    def check_loads(self) -> None:
        """`InputError` for settings that do not go together; nothing starts."""
        require(bool(self.loads), "concurrency", self.concurrency, "one load at least, here or in rates")
        room = self.max_batch_size + self.max_queue
        most = max(self.concurrency, default=0)
        require(
            self.url is not None or most <= room * self.replicas,
            "concurrency",
            most,
            f"at most {room} a replica, max_batch_size + max_queue",
        )
        require(
            not self.offline or self.device == "cpu",
            "offline",
            self.offline,
            "false with a GPU, whose memory the server takes",
        )
        if self.url is None or self.offline:
            self.replica().checked()
