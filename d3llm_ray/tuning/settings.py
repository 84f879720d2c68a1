"""Settings of the verb `tune`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from d3llm_ray.evaluation.settings import ActorOptions
from d3llm_ray.tuning.objective import Metric


class TuneSettings(ActorOptions):
    """Search decoding settings for a model on a task's validation problems."""

    verb: ClassVar[str] = "tune"
    renamed: ClassVar[dict[str, str]] = {"start_timeout_s": "resource_timeout_s"}

    model: str = Field("tiny-llada", description="zoo name or checkpoint folder")
    space: Path = Field(Path("tune_spaces/tiny.yaml"), description="search space (YAML)")
    task: str = Field("arith", description="embedded or published task, or task file")
    split: Literal["validation", "train"] = Field("validation", description="which problems; never those of the test")
    count: int = Field(100, gt=0, description="problems each trial is measured on")
    held_out: int = Field(
        100,
        ge=0,
        description="problems behind those, as many as there are, on which the chosen settings and the decoder's own "
        "are compared",
    )
    trials: int = Field(8, gt=0, description="settings tried, the preset's own and published ones among them")
    metric: Metric = Field(
        "aup",
        description="what is maximised, or both of two; tpf and tps only count within max_accuracy_drop of the "
        "anchor's accuracy",
    )
    racing: Literal["bound", "asha", "none"] = Field(
        "bound",
        description="stop trials that cannot win any more, with 99 % confidence (bound), or are not among the best "
        "third after a shard (asha), or none",
    )
    shards: int = Field(4, gt=0, description="parts of the problems, after each of which a trial may be stopped")
    time_budget_s: float | None = Field(
        None, gt=0, description="seconds after which no more trials are tried, each time the search is started"
    )
    max_accuracy_drop: float = Field(2.0, ge=0.0, le=100.0, description="points of accuracy that tpf and tps may cost")
    anchor: tuple[float, float] | None = Field(
        None, description="(TPF, accuracy in percent) of one token a forward on these problems; default: measured"
    )
    anchor_model: str | None = Field(
        None, description="whose run at one token a forward is the anchor, such as the teacher; default: the model"
    )
    seed: int = Field(0, ge=0, description="seed of the search and of sampling")
    actors: int = Field(2, gt=0, description="engine actors; each trial's problems are shared out over all of them")
    concurrent_trials: int = Field(
        1, gt=0, description="trials at a time; 1 makes the search repeatable, 2 keeps evaluators busy between trials"
    )
    output: Path = Field(Path("runs/tune"), description="folder of settings.yaml and of the search's records")

    @field_validator("anchor")
    @classmethod
    def _accuracy_in_percent(cls, anchor: tuple[float, float] | None) -> tuple[float, float] | None:
        if anchor is not None and 0 < anchor[1] <= 1:  # a share: every trial would beat it
            raise ValueError(f"anchor: got accuracy {anchor[1]:g}; accepted: percent, 0 to 100, such as 81.0")
        return anchor

    @model_validator(mode="after")
    def _race_has_one_figure(self) -> Self:
        if self.racing == "asha" and self.metric.startswith("accuracy-"):
            raise ValueError(f"racing: got 'asha' with metric {self.metric}; accepted: bound or none, as it has two")
        return self
