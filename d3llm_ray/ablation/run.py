"""The verb `ablate`: students with and without each part of a recipe, as a grid of Ray Tune, and what they show."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from ray import tune

from d3llm_ray.ablation.plan import AblationTrial, Design, check_trials, file_digest, make_design, plan_trials
from d3llm_ray.ablation.plots import plot_gains, plot_points
from d3llm_ray.ablation.references import write_reference_answers
from d3llm_ray.ablation.report import AblationReport, make_report
from d3llm_ray.ablation.settings import AblateSettings
from d3llm_ray.ablation.trial import Measure, read_record, record_file, run_trial
from d3llm_ray.ablation.trial import measure as measure_student
from d3llm_ray.cluster import connect, wait_for_resources
from d3llm_ray.config import build
from d3llm_ray.evaluation.rows import check_answered
from d3llm_ray.output_folder import claim
from d3llm_ray.progress import Progress, polled
from d3llm_ray.tasks import EMBEDDED
from d3llm_ray.trajectories.pipeline import run as write_trajectories
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.storage import SUCCESS, Location

TUNE_FOLDER = "tune"


class FailedTrials(RuntimeError):
    """Some students could not be trained or measured; the report of the others is written."""


def run(
    settings: AblateSettings, progress: Progress | None = None, measure: Measure = measure_student
) -> AblationReport:
    """Train and measure what is missing, write the report and return it.

    `measure` carries out a trial, in whatever process, and leaves its record.

    Files in `settings.output`: `ablate.yaml` (these settings), `trajectories/` and `reference-*/` where they are made
    here, `trials/*.json` (a record a student; a finished one is not trained again), `gains.png`,
    `accuracy_vs_tpf.png`, `report.md` and, last of all, `report.json`.

    Raises:
        InputError: a recipe, row, decoder or task that would not work; rows that cannot be trained on; a cluster
            without room for one trial.
        FailedTrials: some trials failed; the next call tries these again.
        IncompleteError: some problems have no answer and count as wrong; the report is written.
        KeyboardInterrupt: the grid was stopped before its end; the next call goes on.
    """
    progress = progress or Progress()
    # A trial works in another folder.
    task = settings.task if settings.task in EMBEDDED else os.path.abspath(settings.task)
    settings = settings.model_copy(update={"output": settings.output.absolute(), "task": task})
    design = make_design(settings)
    claim(settings.output, "ablate.yaml", settings)
    trials = plan_trials(design, *_rows(design, progress))
    steps = check_trials(trials)
    failures = _run_missing(settings, trials, measure, progress)
    records = [read_record(path) for trial in trials if (path := record_file(settings, trial)).is_file()]
    report = make_report(design, steps, records, failures)
    plot_gains(report, settings.output / "gains.png")
    plot_points(report, settings.output / "accuracy_vs_tpf.png")
    report.write(settings.output)
    if failures:
        key, reason = next(iter(failures.items()))
        raise FailedTrials(
            f"{len(failures)} of {len(trials)} trials failed, {key} with: {reason}; the others are in "
            f"{settings.output / 'report.md'}, and the same command tries these again"
        )
    lost = [f"{record.variant}-seed{record.seed}, {text}" for record in records for text in record.unanswered]
    check_answered(lost, settings.output / "report.md")
    return report


def _rows(design: Design, progress: Progress) -> tuple[str, str | None]:
    """The folders of the teacher's rows and, where they are needed, of reference answers; made unless given."""
    settings, trajectories = design.settings, design.settings.trajectories
    if trajectories is None:
        values = {
            "teacher": design.teacher,
            "prompts": settings.task,
            "count": settings.rows,
            "attempts": 1,  # the task has prompts in plenty: another one is as good as another try
            "max_tokens": settings.max_tokens,
            "device": settings.device,
            "gpus_per_actor": settings.gpus_per_actor,
            "output": str(settings.output / "trajectories"),
        }
        trajectories = write_trajectories(build(TrajectorySettings, values), progress)
    trajectories = Location.of(trajectories, "trajectories").name
    references = settings.reference_trajectories
    if references is None and design.needs_reference_answers:
        folder = Location.of(settings.output / f"reference-{file_digest(trajectories)}", "output")
        if not (folder / SUCCESS).exists:
            write_reference_answers(trajectories, design.teacher, folder, settings)
        references = folder.name
    return trajectories, references and Location.of(references, "reference_trajectories").name


def _run_missing(
    settings: AblateSettings, trials: Sequence[AblationTrial], measure: Measure, progress: Progress
) -> dict[str, str]:
    """Run the trials without a record; returns the reasons of those that failed, by key."""
    missing = [trial for trial in trials if not record_file(settings, trial).is_file()]
    if not missing:
        return {}
    connect(min_cpus=settings.concurrent_trials * settings.cpus_per_actor)
    wait_for_resources([settings.resources], settings.resource_timeout_s, "cpus_per_actor and gpus_per_actor")
    shutil.rmtree(settings.output / TUNE_FOLDER, ignore_errors=True)  # an interrupted grid's; records are what counts
    tuner = _tuner(settings, missing, measure)

    def show() -> None:
        progress.update(sum(record_file(settings, trial).is_file() for trial in missing))

    with progress.stage("ablate", len(missing), "trial"):
        with polled(show):
            grid = tuner.fit()
        show()
    results = [grid[index] for index in range(len(grid))]
    failures = {
        missing[(result.config or {})["number"]].key: _reason(result.error) for result in results if result.error
    }
    if any(trial.key not in failures and not record_file(settings, trial).is_file() for trial in missing):
        # Tune turns Ctrl-C into an orderly end of its own; for the caller it still is one.
        raise KeyboardInterrupt("the grid was stopped; run it again to go on")
    return failures


def _tuner(settings: AblateSettings, trials: Sequence[AblationTrial], measure: Measure) -> tune.Tuner:
    trainable = tune.with_parameters(run_trial, trials=list(trials), settings=settings, measure=measure)
    resources = {name.lower(): amount for name, amount in settings.resources.items()}
    return tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={"number": tune.grid_search(list(range(len(trials))))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=settings.concurrent_trials,
            reuse_actors=True,  # torch and transformers take seconds to import
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(name=TUNE_FOLDER, storage_path=str(settings.output), verbose=0),
    )


def _reason(error: BaseException) -> str:
    """The last line of what Ray says of a failed trial: the error itself, below its traceback."""
    return [line.strip() for line in str(error).splitlines() if line.strip()][-1]
