"""Settings of the verb `benchmark`: the fields of `Plan`, and where the files go."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from d3llm_ray.benchmark.plan import Plan
from d3llm_ray.config import Settings

_OPTIONS = {option.name: option for option in fields(Plan)}


def _of_plan(name: str) -> Any:
    """The default and description that `Plan` has for this field."""
    option = _OPTIONS[name]
    if option.default_factory is not MISSING:
        return Field(default_factory=option.default_factory, **option.metadata)
    return Field(option.default, **option.metadata)


class BenchmarkSettings(Settings):
    """Measure decoding speed against what the machine allows, on a model, a checkpoint or a shape."""

    verb: ClassVar[str] = "benchmark"

    model: str | None = _of_plan("model")
    shape: str | None = _of_plan("shape")
    task: str | None = _of_plan("task")
    prompt_tokens: int | None = _of_plan("prompt_tokens")
    requests: int = _of_plan("requests")
    decoders: tuple[str, ...] = _of_plan("decoders")
    suffixes: tuple[str, ...] = _of_plan("suffixes")
    batch_sizes: tuple[int, ...] = _of_plan("batch_sizes")
    max_tokens: tuple[int, ...] = _of_plan("max_tokens")
    decoder_settings: dict[str, Any] = _of_plan("decoder_settings")
    scripted_tpf: float | None = _of_plan("scripted_tpf")
    repeats: int = _of_plan("repeats")
    machine: str = _of_plan("machine")
    dtype: str = _of_plan("dtype")
    device: str = _of_plan("device")
    seed: int = _of_plan("seed")
    output: Path = Field(Path("runs/benchmark"), description="folder of the report")

    @model_validator(mode="after")
    def _check(self) -> BenchmarkSettings:
        self.plan()
        return self

    def plan(self) -> Plan:
        """What to measure."""
        return Plan(**{name: getattr(self, name) for name in _OPTIONS})
