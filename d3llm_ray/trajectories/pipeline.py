"""The Ray Data job: staged prompts -> teacher actors -> staged parts, exactly once, then the finished folder.

Ray Data's checkpoint makes the job resumable: a part and the ids it holds are committed together, and a re-run
reads the prompts again and drops the committed ones. It works on file sources only, hence the staged prompts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from d3llm_ray.cluster import connect
from d3llm_ray.config import to_yaml
from d3llm_ray.errors import InputError
from d3llm_ray.progress import Progress, polled
from d3llm_ray.tasks import Task
from d3llm_ray.trajectories.plan import Plan, check_resumable, make_plan
from d3llm_ray.trajectories.prompts import Prompt
from d3llm_ray.trajectories.publish import STAGED_SCHEMA, check_errors, is_finished, publish
from d3llm_ray.trajectories.schema import build_table
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.storage import COMPRESSION_LEVEL
from d3llm_ray.trajectories.teacher import Teacher


class Tally:
    """Counts finished rows for the progress line and the error limit. Keyed: a retried batch counts once.

    It also carries an actor's `InputError` to the driver, which Ray Data's own wrappers would reduce to a stack trace.
    """

    def __init__(self) -> None:
        self._forwards: dict[str, int] = {}
        self._correct: dict[str, bool] = {}
        self._errors: set[str] = set()
        self._refusal: str | None = None

    def refuse(self, message: str) -> None:
        """Note why an actor cannot go on; the first reason stays."""
        self._refusal = self._refusal or message

    def refusal(self) -> str | None:
        return self._refusal

    def add(self, rows: list[dict[str, Any]]) -> int:
        """Count rows (`prompt_id`, `error`, `is_correct`, `forwards`); returns the errors so far."""
        for row in rows:
            if row["error"] is not None:
                self._errors.add(row["prompt_id"])
                continue
            self._forwards[row["prompt_id"]] = row["forwards"]
            if row["is_correct"] is not None:
                self._correct[row["prompt_id"]] = row["is_correct"]
        return len(self._errors)

    def figures(self) -> dict[str, Any]:
        """`done`, and what the progress line shows beside it."""
        figures: dict[str, Any] = {"done": len(self._forwards) + len(self._errors)}
        if self._correct:
            figures["correct"] = f"{100 * sum(self._correct.values()) / len(self._correct):.1f}%"
        if self._forwards:
            figures["forwards"] = sum(self._forwards.values()) / len(self._forwards)
        if self._errors:
            figures["errors"] = len(self._errors)
        return figures


class TeacherBatches:
    """The class that Ray Data puts into its actors: tables of prompts in, tables of staged rows out."""

    def __init__(self, settings: TrajectorySettings, task: Task, total: int, tally: Any) -> None:
        self._total, self._tally = total, tally
        with self._refusals():
            self._teacher = Teacher(settings, task)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = self._teacher.rows([Prompt(**row) for row in batch.to_pylist()])
        report = [{name: row.get(name) for name in ("prompt_id", "error", "is_correct", "forwards")} for row in rows]
        failed = ray.get(self._tally.add.remote(report))
        example = next((row["error"] for row in rows if "error" in row), "")
        with self._refusals():
            check_errors(failed, self._total, self._teacher.settings.max_error_fraction, example)
        return build_table(rows, STAGED_SCHEMA)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            ray.get(self._tally.refuse.remote(str(error)))
            raise


def run(settings: TrajectorySettings, progress: Progress | None = None) -> str:
    """Write the trajectories of `settings.prompts` into the folder `settings.output`, and return it.

    A finished folder of the same settings is left as it is; an interrupted run is continued. The folder then holds
    `trajectories-*.parquet`, `settings.yaml`, `summary.json`, `errors.jsonl` if any prompt failed, and `_SUCCESS`.
    Raises `InputError` for bad settings, before Ray starts or the model loads where that can be known.
    """
    plan = make_plan(settings)
    if is_finished(plan):
        return settings.output
    done = check_resumable(plan)
    plan.staging.make_folder()
    (plan.output / "settings.yaml").write_text(to_yaml(settings))
    plan.staged_prompts.write_table(plan.prompt_table())
    progress = progress or Progress()
    connect()
    _check_resources(settings)
    progress.start("trajectories", len(plan.prompts), "row")
    started = time.perf_counter()
    try:
        _decode(plan, progress, done)
    finally:
        progress.finish()
    seconds = time.perf_counter() - started
    fresh = len(plan.prompts) - done
    publish(plan, {"seconds": round(seconds, 3), "rows_per_second": round(fresh / seconds, 3), "resumed_rows": done})
    return settings.output


def _check_resources(settings: TrajectorySettings) -> None:
    """Refuse a pool that would wait for ever: reading and the resume filter each need a CPU beside the actors."""
    available: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = int(available.get("CPU", 0)), available.get("GPU", 0.0)
    if settings.actors + 2 > cpus:
        raise InputError(f"actors: got {settings.actors} on a cluster of {cpus} CPUs; accepted: at most {cpus - 2}")
    if settings.actors * settings.gpus_per_actor > gpus:
        raise InputError(
            f"actors: {settings.actors} with {settings.gpus_per_actor:g} GPUs each on a cluster of {gpus:g} GPUs; "
            "accepted: as many as fit"
        )


def _decode(plan: Plan, progress: Progress, done: int) -> None:
    """Run the Ray Data job to its end; parts and checkpoint stay in the staging folder."""
    settings = plan.settings
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    tally: Any = ray.remote(Tally).options(num_cpus=0, scheduling_strategy=here).remote()
    try:
        with DataContext.current(_data_context(plan)), _shown(progress, tally, done):
            prompts = ray.data.read_parquet(plan.staged_prompts.name)
            # read_parquet makes one block of a small file, whatever is asked: one busy actor and one part.
            parts = prompts.repartition(target_num_rows_per_block=settings.rows_per_part, strict=True)
            rows = parts.map_batches(
                TeacherBatches,
                fn_constructor_kwargs={
                    "settings": plan.actor_settings,
                    "task": plan.task,
                    "total": len(plan.prompts),
                    "tally": tally,
                },
                batch_size=settings.rows_per_part,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(size=settings.actors),
                num_cpus=1,
                num_gpus=settings.gpus_per_actor or None,
                udf_modifying_row_count=False,
            )
            rows.write_parquet(plan.parts.name, compression="zstd", compression_level=COMPRESSION_LEVEL)
    except Exception as error:
        refusal = ray.get(tally.refusal.remote())
        if refusal is None:
            raise
        raise InputError(refusal) from error
    finally:
        ray.kill(tally)


def _data_context(plan: Plan) -> DataContext:
    context = DataContext.get_current().copy()
    context.checkpoint_config = CheckpointConfig(
        id_column="prompt_id", checkpoint_path=plan.checkpoint.name, delete_checkpoint_on_success=False
    )
    context.execution_no_progress_timeout_s = plan.settings.stall_timeout_s
    context.enable_progress_bars = False
    return context


@contextmanager
def _shown(progress: Progress, tally: Any, done: int) -> Iterator[None]:
    """Keep the progress line up to date while the job runs."""
    with polled(lambda: _show(progress, tally, done)):
        yield
    _show(progress, tally, done)


def _show(progress: Progress, tally: Any, done: int) -> None:
    try:
        figures = ray.get(tally.figures.remote(), timeout=5)
    except ray.exceptions.RayError:  # a display must not end the job; the job's own errors say what is wrong
        return
    progress.update(done + figures.pop("done"), **figures)
