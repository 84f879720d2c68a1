"""The Ray Data job: staged prompts -> teacher actors -> staged parts, exactly once, then the finished folder.

Ray Data's checkpoint makes the job resumable: a part and the rows it holds are committed together, and a re-run
reads the prompts again and drops the committed ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.data.checkpoint.checkpoint_filter import IdColumnCheckpointManager
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from d3llm_ray.cluster import connect, wait_for_resources
from d3llm_ray.errors import InputError
from d3llm_ray.progress import Progress, polled
from d3llm_ray.trajectories.plan import Plan, make_plan
from d3llm_ray.trajectories.publish import publish
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.staging import Manifest, committed_rows, is_finished, stage
from d3llm_ray.trajectories.storage import COMPRESSION_LEVEL, Location
from d3llm_ray.trajectories.teacher import Teacher
from d3llm_ray.trajectories.worker import STAGED_SCHEMA, MakeTeacher, Tally, TeacherWorker

# Two calls at a time keep an actor's batch full when one nears its end; each has half of what a crash may cost.
CALLS_PER_ACTOR = 2


class CommittedRows(IdColumnCheckpointManager):
    """Reads the committed rows in one go: Ray Data's own way, a read task a file, takes minutes for a million rows."""

    def load_checkpoint(self, data_file_dir: str | None = None, data_file_filesystem: Any = None) -> tuple[Any, int]:
        """(reference to the ascending rows or None, their bytes), after undoing parts that were not committed."""
        self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        rows = committed_rows(Location(self.filesystem, self.checkpoint_path_unwrapped, self.checkpoint_path))
        return (ray.put(rows), rows.nbytes) if rows.size else (None, 0)


def run(settings: TrajectorySettings, progress: Progress | None = None, make_teacher: MakeTeacher = Teacher) -> str:
    """Write the trajectories of `settings.prompts` into the folder `settings.output`, and return it.

    A finished folder of the same settings is left as it is; an interrupted run is continued. The folder then holds
    `trajectories-*.parquet`, `settings.yaml`, `summary.json`, `errors.parquet` if any prompt failed, and `_SUCCESS`.

    Raises:
        InputError: bad settings, before Ray starts or the model loads where that can be known; too many failed
            prompts; a cluster without room for the actors.
        OSError: the storage refuses a write (a full disk, say). What is committed stays, and a re-run goes on.
    """
    plan, progress = make_plan(settings), progress or Progress()
    if is_finished(plan, progress):
        return settings.output
    manifest = stage(plan, progress)
    done = len(committed_rows(plan.checkpoint))
    connect(min_cpus=settings.actors + 2)
    figures: dict[str, Any] = {"resumed_rows": done}
    if done < manifest.prompts:
        wait_for_resources(_demand(settings), settings.resource_timeout_s, "actors")
        progress.start("trajectories", manifest.prompts, "row")
        try:
            seconds = _decode(plan, manifest, progress, done, make_teacher)
        finally:
            progress.finish()
        figures |= {"seconds": round(seconds, 3), "rows_per_second": round((manifest.prompts - done) / seconds, 3)}
    publish(plan, manifest, figures, progress)
    return settings.output


def _demand(settings: TrajectorySettings) -> list[dict[str, float]]:
    """What the job cannot begin without: the first actors, a CPU to read and write, the filter of a resumed run."""
    actor = {"CPU": 1.0, **({"GPU": settings.gpus_per_actor} if settings.gpus_per_actor else {})}
    filtering = {"CPU": 1.0, "memory": float(CheckpointConfig.CHECKPOINT_ACTOR_MEMORY_BYTES)}
    return [actor] * (settings.min_actors or settings.actors) + [{"CPU": 1.0}, filtering]


def _decode(plan: Plan, manifest: Manifest, progress: Progress, done: int, make_teacher: MakeTeacher) -> float:
    """Run the Ray Data job to its end; parts and checkpoint stay in the staging folder.

    Returns the seconds from when the teachers were ready to the last row.
    """
    settings, filesystem = plan.settings, plan.output.filesystem
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    tally: Any = ray.remote(Tally).options(num_cpus=0, scheduling_strategy=here).remote()
    rows_per_call = max(1, settings.rows_per_block // CALLS_PER_ACTOR)
    try:
        with DataContext.current(_data_context(plan)), _shown(progress, tally, done, settings.operator_bars):
            prompts = ray.data.read_parquet(plan.staged_prompts.path, filesystem=filesystem)
            # read_parquet makes one block of a small file, whatever is asked: one busy actor and one part.
            blocks = prompts.repartition(target_num_rows_per_block=rows_per_call, strict=True)
            rows = blocks.map_batches(
                TeacherWorker,
                fn_constructor_kwargs={
                    "settings": plan.actor_settings,
                    "task": plan.source.task,
                    "total": manifest.prompts,
                    "tally": tally,
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
                udf_modifying_row_count=False,
            )
            rows.write_parquet(
                plan.parts.path,
                filesystem=filesystem,
                compression="zstd",
                compression_level=COMPRESSION_LEVEL,
                schema=STAGED_SCHEMA,
            )
        return float(ray.get(tally.seconds.remote()))
    except Exception as error:
        refusal = ray.get(tally.refusal.remote())
        if refusal is not None:
            raise InputError(refusal) from error
        raise _storage_error(error) or error from error
    finally:
        ray.kill(tally)


def _storage_error(error: BaseException) -> OSError | None:
    """The write error that a worker met, out of Ray's wrappers; None when it was something else."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno is not None:
            return OSError(inner.errno, inner.strerror, inner.filename)
        inner = getattr(inner, "cause", None) or inner.__cause__
    return None


def _data_context(plan: Plan) -> DataContext:
    context = DataContext.get_current().copy()
    context.checkpoint_config = CheckpointConfig(
        id_column="row",
        checkpoint_path=plan.checkpoint.path,
        delete_checkpoint_on_success=False,
        override_filesystem=plan.output.filesystem,
        checkpoint_manager_cls=CommittedRows,
    )
    context.execution_no_progress_timeout_s = plan.settings.stall_timeout_s
    context.enable_progress_bars = plan.settings.operator_bars
    return context


@contextmanager
def _shown(progress: Progress, tally: Any, done: int, operator_bars: bool) -> Iterator[None]:
    """Keep the progress line up to date while the job runs."""
    if operator_bars:
        progress.finish()
        yield
        return
    with polled(lambda: _show(progress, tally, done)):
        yield
    _show(progress, tally, done)


def _show(progress: Progress, tally: Any, done: int) -> None:
    try:
        figures = ray.get(tally.figures.remote(), timeout=5)
    except ray.exceptions.RayError:  # a display must not end the job; the job's own errors say what is wrong
        return
    progress.update(done + figures.pop("done"), **figures)
