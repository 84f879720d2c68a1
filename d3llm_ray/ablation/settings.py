"""Settings of the verb `ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from d3llm_ray.ablation.statistics import MAX_SEEDS
from d3llm_ray.config import DecoderSettings, Settings


class AblateSettings(Settings):
    """Distil with and without each part of a recipe, several seeds each, and compare the students (Ray Tune)."""

    verb: ClassVar[str] = "ablate"
    renamed: ClassVar[dict[str, str]] = {
        "problems": "count",
        "cpus_per_trial": "cpus_per_actor",
        "gpus_per_trial": "gpus_per_actor",
    }

    recipe: Path | None = Field(
        None,
        description="settings of `d3llm-ray distill` that all students share, a YAML file or the name of a shipped "
        "recipe; null: the embedded model's",
    )
    distill: dict[str, Any] = Field({}, description="settings that replace the recipe's")
    teacher: str | None = Field(None, description="zoo name or checkpoint folder; null: the recipe's")
    trajectories: str | None = Field(
        None, description="finished trajectory folder, any pyarrow.fs path; null: the teacher decodes `rows` prompts"
    )
    reference_trajectories: str | None = Field(
        None,
        description="finished folder of the same prompts with reference answers; null: written by the embedded task",
    )
    rows: int = Field(700, gt=0, description="prompts that the teacher decodes, without `trajectories`")

    variants: list[str] = Field([], description="rows, or claims, to compare with the recipe; none: all")
    variants_file: Path | None = Field(None, description="rows of your own (YAML) instead of the built-in ones")
    seeds: int = Field(3, ge=2, le=MAX_SEEDS, description="students of each row, with seeds 0, 1, ...")

    task: str = Field("arith", description="embedded task, or a prompts file with references")
    split: Literal["test", "validation"] = Field("test", description="which problems the students solve")
    count: int = Field(250, gt=0, description="how many of them")
    decoder: str = Field("d3llm-nocache", description="preset or settings file that decodes them")
    decoder_settings: DecoderSettings = Field({}, description="decoder settings that replace its own")
    thresholds: tuple[float, ...] = Field(
        (0.15, 0.45, 0.7), min_length=1, description="entropy thresholds that a student is measured at"
    )
    reference_threshold: float = Field(0.45, description="the one of them whose accuracy and TPF are compared")
    max_tokens: int = Field(64, gt=0, description="canvas in tokens")
    max_batch_size: int = Field(32, gt=0, description="requests decoded together")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("float32", description="weights when evaluated")

    device: str = Field("cpu", pattern="^(cpu|cuda)$", description="where students train and decode: cpu or cuda")
    cpus_per_actor: int = Field(1, gt=0, description="CPUs, and threads, of one student's distillation and evaluation")
    gpus_per_actor: float = Field(0.0, ge=0.0, description="GPUs of one student")
    concurrent_trials: int = Field(2, gt=0, description="students at a time, as far as the cluster has room")
    resource_timeout_s: float = Field(25.0, gt=0, description="how long to wait for the cluster to have room for one")
    keep_students: bool = Field(False, description="keep the checkpoints in students/")
    output: Path = Field(Path("runs/ablate"), description="folder of the report, on storage that all nodes share")

    @model_validator(mode="after")
    def _consistent(self) -> AblateSettings:
        if self.reference_threshold not in self.thresholds:
            raise ValueError(
                f"reference_threshold: got {self.reference_threshold}; accepted: one of thresholds, "
                f"{list(self.thresholds)}"
            )
        if len(set(self.thresholds)) < len(self.thresholds):
            raise ValueError(f"thresholds: got {list(self.thresholds)}; accepted: each once")
        if (self.device == "cuda") != (self.gpus_per_actor > 0):
            raise ValueError(
                f"gpus_per_actor: got {self.gpus_per_actor:g} with device: {self.device}; accepted: a number above 0 "
                "with device: cuda, 0 with device: cpu"
            )
        return self

    @property
    def resources(self) -> dict[str, float]:
        """What one trial takes of the cluster."""
        gpus = {"GPU": self.gpus_per_actor} if self.gpus_per_actor else {}
        return {"CPU": float(self.cpus_per_actor), **gpus}
