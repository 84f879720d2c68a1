"""The verb `check transfer`: are settings that were tuned on one task as good on another as those tuned on it?"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from d3llm_ray.checks.transfer_report import TransferReport
from d3llm_ray.decoding.presets import plain_decoder
from d3llm_ray.evaluation import run as evaluation
from d3llm_ray.evaluation.rows import check_answered, unanswered
from d3llm_ray.evaluation.settings import ActorOptions, EvaluateSettings, MeasureOptions, Pair
from d3llm_ray.models import read_configs
from d3llm_ray.output_folder import claim, sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.report import can_plot
from d3llm_ray.tasks import load_task
from d3llm_ray.tuning import run as tuning
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.tuning.space import read_space


class TransferSettings(MeasureOptions):
    """Tune on two tasks, and compare on the second what each search chose: `d3llm-ray check transfer`."""

    verb: ClassVar[str] = "check transfer"

    model: str = Field("tiny-llada-d3llm", description="zoo name or checkpoint folder, which can do both tasks")
    source: str = Field("arith", description="task to tune on: embedded or published task, or task file")
    task: str = Field("arith-long", description="task to tune on as well, on whose test problems both are measured")
    space: Path = Field(Path("tune_spaces/tiny.yaml"), description="search space (YAML) of both searches")
    trials: int = Field(24, gt=0, description="settings tried in each search")
    metric: Literal["aup", "smooth-aup"] = Field("smooth-aup", description="what both maximise, and are compared by")
    validation_count: int = Field(100, gt=0, description="validation problems of each task, which are searched on")
    count: int = Field(200, gt=0, description="test problems of `task`, which the figures are of")
    actors: int = Field(2, gt=0, description="engine actors on Ray that share the problems")
    output: Path = Field(Path("runs/checks/transfer"), description="folder of the report and of both searches")

    @model_validator(mode="after")
    def _two_tasks(self) -> Self:
        if self.source == self.task:
            raise ValueError(f"source: got {self.source!r}; accepted: another task than `task`")
        return self

    def search(self, task: str, folder: str) -> TuneSettings:
        """Of one task; what it is measured on has its own verb's options, so that there are no held-out problems."""
        shared = self.model_dump(include={*ActorOptions.model_fields, "model", "space", "trials", "metric"})
        return TuneSettings(
            **shared, task=task, count=self.validation_count, held_out=0, output=self.output / "searches" / folder
        )


@sole_writer
def run(settings: TransferSettings, progress: Progress | None = None) -> TransferReport:
    """Search, measure and write; returns the report.

    Files in `settings.output`: `transfer.yaml` (these settings), `searches/source` and `searches/task` (as of `tune`),
    `measured/` (a report of `evaluate` with every answer), `transfer.png`, `report.md` and, last, `report.json`. An
    interrupted check goes on.

    Raises:
        InputError: a model, task, space or setting that is none; before any search.
        IncompleteError: some problems have no answer and count as wrong; the report is written.
    """
    progress = progress or Progress()
    space = read_space(settings.space)
    family = read_configs(settings.model)[1]
    space.base().check(family)
    for task in (settings.source, settings.task):
        load_task(task, settings.data_dir).check_judge()
    claim(settings.output, "transfer.yaml", settings)
    chosen = {
        folder: tuning.run(settings.search(task, folder), progress, errors="return")
        for folder, task in (("task", settings.task), ("source", settings.source))
    }
    decoders = [
        (plain_decoder(family).name, "one token a forward"),
        (space.decoder, "own settings"),
        (str(chosen["task"]), f"tuned on {settings.task}"),
        (str(chosen["source"]), f"tuned on {settings.source}"),
    ]
    given = EvaluateSettings(
        **settings.model_dump(include={*MeasureOptions.model_fields, "count"}),
        pairs=[Pair(model=settings.model, decoder=each, decoder_label=label) for each, label in decoders],
        tasks=[settings.task],
        output=settings.output / "measured",
    )
    rows = evaluation.run(given, progress, errors="return").rows
    report = TransferReport(settings.source, settings.task, settings.metric, settings.seed, rows)
    if can_plot(picture := settings.output / "transfer.png"):
        from d3llm_ray.checks.plots import plot_transfer

        plot_transfer(report, picture)
    report.write(settings.output)
    check_answered([f"{row.decoder}, {text}" for row in rows for text in unanswered(row.samples)], settings.output)
    return report
