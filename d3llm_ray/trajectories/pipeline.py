"""The Ray Data job: staged prompts -> teacher actors -> committed parts, exactly once, then the finished folder.

Each actor commits its parts itself, and a re-run stages the prompts that no part holds. Ray Data's own checkpoint
would commit a part in a later task: what waits for it is lost with the driver, and its loader starts a read task for
every part, minutes of them at a million rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from ray.data import ActorPoolStrategy, DataContext, Dataset, read_parquet
from ray.exceptions import RayError

from d3llm_ray.cluster import connect, quieten, wait_for_resources
from d3llm_ray.errors import IncompleteError, InputError, StorageError
from d3llm_ray.output_folder import sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.trajectories.plan import TrajectoryPlan, make_plan
from d3llm_ray.trajectories.publish import publish
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.shards import check_errors, missing_rows
from d3llm_ray.trajectories.staging import Manifest, committed_rows, is_finished, stage, stage_remaining
from d3llm_ray.trajectories.storage import Location
from d3llm_ray.trajectories.teacher import Teacher
from d3llm_ray.trajectories.worker import COUNTS, MakeTeacher, TeacherWorker

# Two calls at a time keep an actor's batch full when one nears its end; each has half of what a crash may cost.
CALLS_PER_ACTOR = 2


def run(settings: TrajectorySettings, progress: Progress | None = None, make_teacher: MakeTeacher = Teacher) -> str:
    """`write_trajectories`; `IncompleteError` behind it where some prompts gave no row, also of an earlier call."""
    plan = _write(settings, progress or Progress(), make_teacher)
    missing = missing_rows(plan.output, "prompts")
    if missing is not None:
        raise IncompleteError(missing)
    return settings.output


def write_trajectories(settings: TrajectorySettings, progress: Progress | None = None) -> str:
    """Write the trajectories of `settings.prompts` into the folder `settings.output`, and return it.

    A finished folder of the same settings is left as it is; an interrupted run is continued. The folder then holds
    `trajectories-*.parquet`, `settings.yaml`, `summary.json`, `errors.parquet` if any prompt failed, and `_SUCCESS`.
    What goes on from here does without the prompts that failed, if they are not too many; the display says which.

    Raises:
        InputError: bad settings, before Ray starts or the model loads where that can be known; too many failed
            prompts; a cluster without room for the actors.
        StorageError: the storage refuses a write (a full disk, say). What is committed stays, and a re-run goes on.
    """
    progress = progress or Progress()
    plan = _write(settings, progress, Teacher)
    missing = missing_rows(plan.output, "prompts")
    if missing is not None:
        progress.note(f"warning: {missing}")
    return settings.output


@sole_writer
def _write(settings: TrajectorySettings, progress: Progress, make_teacher: MakeTeacher) -> TrajectoryPlan:
    plan = make_plan(settings)
    if is_finished(plan, progress):
        return plan
    manifest = stage(plan, progress)
    committed = committed_rows(plan.parts)
    done = len(committed)
    figures: dict[str, Any] = {"resumed_rows": done}
    if done < manifest.prompts:
        connect(min_cpus=settings.actors + 1)
        wait_for_resources(_demand(settings), settings.resource_timeout_s, "actors")
        prompts = stage_remaining(plan, committed)
        with progress.stage("trajectories", manifest.prompts):
            seconds = _decode(plan, prompts, manifest, progress, done, make_teacher)
        figures |= {"seconds": round(seconds, 3), "rows_per_second": round((manifest.prompts - done) / seconds, 3)}
    publish(plan, manifest, figures, progress)
    return plan


def _demand(settings: TrajectorySettings) -> list[dict[str, float]]:
    """What the job cannot begin without: the first actors, and a CPU to read prompts."""
    actor = {"CPU": 1.0, **({"GPU": settings.gpus_per_actor} if settings.gpus_per_actor else {})}
    return [actor] * (settings.min_actors or settings.actors) + [{"CPU": 1.0}]


def _decode(
    plan: TrajectoryPlan,
    prompts: Location,
    manifest: Manifest,
    progress: Progress,
    done: int,
    make_teacher: MakeTeacher,
) -> float:
    """Run the Ray Data job over staged `prompts` to its end; the parts stay in the staging folder.

    Returns the seconds from when the first teacher was ready to the last commit.
    """
    settings = plan.settings
    sums = dict.fromkeys(COUNTS, 0)
    ready, committed = float("inf"), 0.0
    plan.parts.make_folder()
    if settings.operator_bars:
        progress.finish()
    else:
        quieten("ray.data")
    try:
        with DataContext.current(_data_context(settings)):
            for receipt in _receipts(_dataset(plan, prompts, make_teacher)):
                if receipt["refusal"] is not None:
                    raise StorageError(receipt["errno"], receipt["refusal"])
                for name in sums:
                    sums[name] += receipt[name]
                check_errors(sums["errors"], manifest.prompts, settings.max_error_fraction, receipt["example"])
                ready, committed = min(ready, receipt["ready"]), max(committed, receipt["committed"])
                progress.update(done + sums["rows"] + sums["errors"], **_shown(sums))
    except RayError as error:
        refusal = _input_error(error)
        if refusal is None:
            raise
        raise refusal from error
    return committed - ready


def _dataset(plan: TrajectoryPlan, prompts: Location, make_teacher: MakeTeacher) -> Dataset:
    settings = plan.settings
    rows_per_call = max(1, settings.rows_per_block // CALLS_PER_ACTOR)
    # read_parquet makes one block of a small file, whatever is asked: one busy actor and one part.
    rows = read_parquet(prompts.path, filesystem=prompts.filesystem)
    return rows.repartition(target_num_rows_per_block=rows_per_call, strict=True).map_batches(
        TeacherWorker,
        fn_constructor_kwargs={
            "settings": plan.actor_settings,
            "task": plan.source.task,
            "parts": plan.parts,
            "make_teacher": make_teacher,
        },
        batch_size=rows_per_call,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=settings.min_actors or settings.actors,
            max_size=settings.actors,
            max_concurrent_calls_per_actor=CALLS_PER_ACTOR,
        ),
        num_cpus=1,
        num_gpus=settings.gpus_per_actor or None,
    )


def _receipts(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Receipts of the parts, as they are committed."""
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        assert isinstance(batch, pa.Table)
        yield from batch.to_pylist()


def _data_context(settings: TrajectorySettings) -> DataContext:
    context = DataContext.get_current().copy()
    context.execution_no_progress_timeout_s = settings.stall_timeout_s
    context.enable_progress_bars = settings.operator_bars
    context.memory_usage_poll_interval_s = None  # reads every page of an actor each second, in a thread a call
    return context


def _shown(sums: dict[str, int]) -> dict[str, Any]:
    """What the progress line shows beside the rows."""
    figures: dict[str, Any] = {}
    if sums["judged"]:
        figures["correct"] = f"{100 * sums['correct'] / sums['judged']:.1f}%"
    if sums["rows"]:
        figures["forwards"] = sums["forwards"] / sums["rows"]
    return figures | {name: sums[name] for name in ("retries", "errors") if sums[name]}


def _input_error(error: RayError) -> InputError | None:
    """The bad input that an actor met when it was made; of its errors Ray keeps the text only."""
    refusal = re.search(rf"^{InputError.__module__}\.InputError: (.*)$", str(error), re.MULTILINE)
    return InputError(refusal[1]) if refusal else None
