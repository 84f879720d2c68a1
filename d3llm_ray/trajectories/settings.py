"""Settings of a trajectory run."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from d3llm_ray.config import Settings
from d3llm_ray.tasks import Split


class TrajectorySettings(Settings):
    """Let a teacher decode prompts one token a step, and keep the order in which it revealed every token."""

    verb: ClassVar[str] = "trajectories"

    teacher: str = Field("tiny-llada", description="zoo name or checkpoint folder of the teacher")
    prompts: str = Field(
        "arith", description="embedded task, or a .jsonl or .parquet file with messages or prompt, and reference"
    )
    texts: list[str] = Field([], description="prompts written here; they replace `prompts` when there are any")
    split: Split = Field("train", description="split of an embedded task")
    count: int | None = Field(None, ge=1, description="prompts to decode; null: a whole file, 2000 of an embedded task")
    output: str = Field("runs/trajectories", description="folder to write, any pyarrow.fs path")

    max_tokens: int = Field(64, ge=1, description="response positions; a multiple of the block size")
    block_size: int | None = Field(None, ge=1, description="positions a block; null: the model's own")
    early_stop: bool = Field(True, description="end a row at its first stop token; false fills the whole canvas")
    attempts: int = Field(5, ge=1, description="decodings of a prompt at most, until one equals the reference")
    temperatures: tuple[float, ...] = Field(
        (0.0, 0.1, 0.2, 0.3, 0.4), validate_default=True, description="temperature of each attempt"
    )
    seed: int = Field(0, ge=0, description="seeds every row, together with its prompt_id")

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("float32", description="weights of the teacher")
    device: str = Field("cpu", description="torch device of a teacher actor: cpu or cuda")
    actors: int = Field(2, ge=1, description="teacher actors; each takes one CPU, or gpus_per_actor GPUs as well")
    gpus_per_actor: float = Field(0.0, ge=0.0, validate_default=True, description="GPUs a teacher actor takes")
    batch_size: int = Field(32, ge=1, description="rows that one actor decodes at a time")
    rows_per_part: int = Field(64, ge=1, description="rows of one unit of work: what a crash costs an actor at most")
    rows_per_file: int = Field(50_000, ge=1, description="rows of one output file")
    max_error_fraction: float = Field(0.05, ge=0.0, le=1.0, description="stop when more prompts than this fail")
    stall_timeout_s: float = Field(900.0, gt=0.0, description="stop when no unit of work ends for so many seconds")

    @field_validator("temperatures")
    @classmethod
    def _check_temperatures(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        attempts = info.data.get("attempts", 1)
        if len(value) < attempts:
            raise ValueError(f"temperatures: got {len(value)} for {attempts} attempts; accepted: one for each")
        if not all(0.0 <= temperature < float("inf") for temperature in value):
            raise ValueError(f"temperatures: got {value}; accepted: numbers, 0 or more")
        return value

    @field_validator("gpus_per_actor")
    @classmethod
    def _check_gpus(cls, value: float, info: ValidationInfo) -> float:
        if str(info.data.get("device")).startswith("cuda") and not value:
            raise ValueError("gpus_per_actor: got 0 with device 'cuda'; accepted: a number above 0, 1 for a whole GPU")
        return value

    @property
    def ladder(self) -> tuple[float, ...]:
        """The temperatures that are used, one an attempt."""
        return self.temperatures[: self.attempts]

    def decoding(self, block_size: int | None, by_entropy: bool) -> dict[str, Any]:
        """The teacher's decoder, as a decoding settings file has it: one token a forward in the family's own order.

        LLaDA reveals the most probable token, Dream (`by_entropy`) that of lowest entropy (d3LLM's data preparation).
        """
        order: dict[str, Any] = {"decoder": "vanilla", "steps": None}
        if by_entropy:
            order = {"decoder": "dparallel", "entropy_threshold": 0.0}
        return {**order, "block_size": block_size, "early_stop": self.early_stop}

    def generation(self, block_size: int, by_entropy: bool = False) -> dict[str, Any]:
        """All that a row depends on besides its prompt and reference; part of every `prompt_id`.

        `block_size`: the one in effect; `by_entropy`: the teacher's family reveals in that order. Machine settings
        (actors, batch size, device) change no row.
        """
        return {
            "teacher": self.teacher,
            "dtype": self.dtype,
            "decoder": self.decoding(block_size, by_entropy),
            "max_tokens": self.max_tokens,
            "temperatures": list(self.ladder),
            "seed": self.seed,
        }
