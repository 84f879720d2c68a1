"""Settings of a trajectory run."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from d3llm_ray.config import DecoderSettings, Settings
from d3llm_ray.tasks import Split


class TrajectorySettings(Settings):
    """Let a teacher decode prompts, and keep the order in which it revealed every token."""

    verb: ClassVar[str] = "trajectories"
    renamed: ClassVar[dict[str, str]] = {
        "batch_size": "max_batch_size",
        "steps": "decoder_settings.steps",
        "block_size": "decoder_settings.block_size",
        "early_stop": "decoder_settings.early_stop",
    }

    verbatim: ClassVar[frozenset[str]] = frozenset({"texts"})

    teacher: str = Field("tiny-llada", description="zoo name or checkpoint folder of the teacher")
    prompts: str = Field(
        "arith",
        description="embedded task; .jsonl or .parquet file, or a folder of them, local, s3:// or gs://; "
        "or a `datasets` name, OWNER/NAME[:CONFIG]",
    )
    texts: list[str] = Field([], description="prompts written here, a flag each; they replace `prompts`")
    split: Split = Field(
        "train",
        description="split of an embedded task, of a `datasets` name, or of a folder whose files are called after it",
    )
    count: int | None = Field(
        None, ge=1, description="prompts to decode; null: a whole source, 2000 of an embedded task"
    )
    output: str = Field("runs/trajectories", description="folder to write, any pyarrow.fs path")
    keep: Literal["all", "correct"] = Field("all", description="correct: leave out rows whose answer is wrong")

    decoder: str | None = Field(
        None, description="preset or decoding settings file; null: one token a forward, in the family's own order"
    )
    decoder_settings: DecoderSettings = Field(
        {},
        description="settings that override the decoder's, such as steps of `vanilla`: forwards of a canvas; "
        "early_stop (nothing is decoded behind a row's first stop token) is false unless said here or in the file",
    )
    max_tokens: int = Field(64, ge=1, description="response positions; a multiple of the block size")
    attempts: int = Field(5, ge=1, description="decodings of a prompt at most, until one equals the reference")
    temperatures: tuple[float, ...] = Field(
        (0.0, 0.1, 0.2, 0.3, 0.4), validate_default=True, description="temperature of each attempt"
    )
    seed: int = Field(0, ge=0, description="seeds every row, together with its prompt_id")

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("float32", description="weights of the teacher")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="of a teacher actor: cpu, cuda or cuda:N")
    actors: int = Field(2, ge=1, description="teacher actors; each takes one CPU, or gpus_per_actor GPUs as well")
    min_actors: int | None = Field(
        None, ge=1, validate_default=True, description="actors to begin with, up to `actors` as the cluster has room"
    )
    gpus_per_actor: float = Field(0.0, ge=0.0, validate_default=True, description="GPUs a teacher actor takes")
    max_batch_size: int = Field(32, ge=1, description="rows that one actor decodes at a time")
    rows_per_block: int = Field(64, ge=2, description="rows an actor works on: what its crash costs at most")
    rows_per_file: int = Field(50_000, ge=1, description="rows of one output file")
    max_error_fraction: float = Field(
        0.05, ge=0.0, le=1.0, description="stop when more prompts than this fail; a single one stops a run at 0 only"
    )
    resource_timeout_s: float = Field(
        110.0, gt=0.0, description="stop when the cluster has not given the first actors within so many seconds"
    )
    stall_timeout_s: float = Field(900.0, gt=0.0, description="stop when no block ends for so many seconds")
    operator_bars: bool = Field(False, description="show Ray Data's own bars, one an operator, instead of one line")

    @field_validator("temperatures")
    @classmethod
    def _check_temperatures(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        attempts = info.data.get("attempts", 1)
        if len(value) < attempts:
            raise ValueError(f"temperatures: got {len(value)} for {attempts} attempts; accepted: one for each")
        if not all(0.0 <= temperature < float("inf") for temperature in value):
            raise ValueError(f"temperatures: got {value}; accepted: numbers, 0 or more")
        return value

    @field_validator("min_actors")
    @classmethod
    def _check_min_actors(cls, value: int | None, info: ValidationInfo) -> int | None:
        actors = info.data.get("actors", 1)
        if value is not None and value > actors:
            raise ValueError(f"min_actors: got {value}; accepted: at most `actors`, {actors}")
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
