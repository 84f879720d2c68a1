"""Settings of the quickstart: what it does by default, and how each stage may be changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from d3llm_ray.config import Settings, build, merge, read_yaml
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.evaluation.settings import EvaluateSettings
from d3llm_ray.serving.settings import ServeSettings
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.tuning.settings import TuneSettings

Overrides = dict[str, Any]


class QuickstartSettings(Settings):
    """Run every stage in order: teacher trajectories, distillation, tuning, evaluation, serving."""

    verb: ClassVar[str] = "quickstart"
    renamed: ClassVar[dict[str, str]] = {"problems": "count"}

    teacher: str = Field("tiny-llada", description="zoo name or checkpoint folder of the model to make faster")
    task: str = Field("arith", description="embedded task, or a prompts file with references")
    rows: int = Field(1400, gt=0, description="trajectories to generate")
    count: int = Field(500, gt=0, description="test problems of the final table")
    trials: int = Field(8, gt=0, description="decoding settings that tuning tries")
    max_tokens: int = Field(64, gt=0, description="canvas in tokens")
    seed: int = Field(0, ge=0, description="seed of every stage")
    output: Path = Field(Path("runs/quickstart"), description="folder of everything that is made")
    fresh: bool = Field(
        False, description="remove what an earlier quickstart has left there first, instead of skipping finished stages"
    )
    question: str = Field(
        "Tom has 12 apples. Tom buys 7 more. Then Tom loses 5 apples. How many apples does Tom have now?",
        description="what the served student is asked",
    )
    trajectories: Overrides = Field(
        {}, description="settings of `d3llm-ray trajectories` that replace the defaults here"
    )
    distill: Overrides = Field({}, description="settings of `d3llm-ray distill`, likewise")
    tune: Overrides = Field({}, description="settings of `d3llm-ray tune`, likewise")
    evaluate: Overrides = Field({}, description="settings of `d3llm-ray evaluate`, likewise")
    serve: Overrides = Field({}, description="settings of `d3llm-ray serve`, likewise")

    @property
    def student(self) -> Path:
        return self.output / "student"

    @property
    def decoding(self) -> Path:
        """The tuned decoding settings."""
        return self.output / "settings.yaml"

    def trajectory_settings(self) -> TrajectorySettings:
        values: Overrides = {
            "teacher": self.teacher,
            "prompts": self.task,
            "count": self.rows,
            "attempts": 1,  # the task has prompts in plenty: another one is as good as another try
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "output": str(self.output / "trajectories"),
        }
        return build(TrajectorySettings, values | self.trajectories, "trajectories")

    def distill_settings(self) -> DistillSettings:
        """The `tiny` recipe, whatever the teacher."""
        assert DistillSettings.recipes is not None
        recipe = read_yaml(DistillSettings.recipes / "tiny.yaml", "distill")
        values: Overrides = {
            "teacher": self.teacher,
            "trajectories": str(self.output / "trajectories"),
            "keep": "correct",
            "seed": self.seed,
            "output": str(self.student),
        }
        return build(DistillSettings, merge({**recipe, **values}, self.distill), "distill")

    def tune_settings(self) -> TuneSettings:
        values: Overrides = {
            "model": str(self.student),
            "anchor_model": self.teacher,  # as in the final table
            "task": self.task,
            "trials": self.trials,
            "count": 200,
            "held_out": 0,  # the final table is of the test's problems
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "output": self.output / "tuning",
        }
        return build(TuneSettings, values | self.tune, "tune")

    def evaluate_settings(self) -> EvaluateSettings:
        """The rows of the table; the teacher runs with the tuned settings too, for a like-for-like comparison."""
        teacher, student, tuned = self.teacher, str(self.student), str(self.decoding)
        values: Overrides = {
            "pairs": [
                {"model": teacher, "decoder": "vanilla"},
                {"model": teacher, "decoder": "d3llm"},
                {"model": teacher, "decoder": tuned, "decoder_label": "d3llm (tuned)"},
                {"model": student, "decoder": "d3llm-nocache"},
                {"model": student, "decoder": tuned, "decoder_label": "d3llm (tuned)"},
            ],
            "anchors": {"student": Path(teacher).name},
            "tasks": [self.task],
            "count": self.count,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "output": self.output,
        }
        return build(EvaluateSettings, values | self.evaluate, "evaluate")

    def serve_settings(self) -> ServeSettings:
        values: Overrides = {
            "model": str(self.student),
            "decoder": str(self.decoding),
            "max_tokens": self.max_tokens,
            "port": 0,
        }
        return build(ServeSettings, values | self.serve, "serve")
