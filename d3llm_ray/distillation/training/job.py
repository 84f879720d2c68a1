"""One worker's whole work, with any engine: build the student, resume, train, validate, write the result."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from d3llm_ray.distillation.data import TrajectorySet
from d3llm_ray.distillation.objectives import LossModule
from d3llm_ray.distillation.objectives.batches import MicroBatch
from d3llm_ray.distillation.plan import TrainingPlan
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.student import build_student, write_student
from d3llm_ray.distillation.training import checkpoints
from d3llm_ray.distillation.training.engines import EngineOptions, TrainingEngine
from d3llm_ray.distillation.training.loop import Hooks, barrier, train
from d3llm_ray.distillation.training.trackers import Tracker
from d3llm_ray.distillation.training.validation import Validator

logger = logging.getLogger("d3llm_ray.distillation")

CHECKPOINTS, STUDENT = "checkpoints", "student"

MakeEngine = Callable[[LossModule, EngineOptions], TrainingEngine]
MakeStream = Callable[[range], Iterator[MicroBatch]]
MakeTracker = Callable[[int], Tracker]


@dataclass(frozen=True)
class Job:
    """What all workers of a run share. `work` is a folder that all of them see."""

    settings: DistillSettings
    plan: TrainingPlan
    held_out: TrajectorySet
    work: Path


def run_worker(
    job: Job, device: torch.device, make_engine: MakeEngine, make_stream: MakeStream, make_tracker: MakeTracker
) -> None:
    """Train from the newest intact checkpoint to the end, and leave the student in the work folder.

    `make_stream(numbers)` yields the micro-batches of those numbers; `make_tracker(step)`, called on the first worker
    only, opens a tracker that goes on behind `step`. Raises `NotFiniteError`.
    """
    settings, plan = job.settings, job.plan
    torch.manual_seed(settings.seed)  # adapters
    module, family = build_student(settings, device)
    engine = make_engine(module, settings.engine_options())
    folder = job.work / CHECKPOINTS
    done = _resume(engine, folder)
    first = engine.rank == 0

    def write(directory: Path) -> None:
        write_student(module.model, family, settings, directory)

    held_out = plan.validation(job.held_out, engine.rank, engine.world_size) if settings.held_out else []
    validator = Validator(settings, module, family, engine, held_out, write, job.work, device)
    with contextlib.closing(make_tracker(done)) if first else contextlib.nullcontext() as tracker:
        hooks = Hooks(
            log=tracker.log if tracker is not None else lambda _line: None,
            save=lambda step: save(engine, folder, step, settings.keep_checkpoints),
            validate=validator,
        )
        batches = make_stream(plan.numbers(done, engine.rank, engine.world_size))
        train(engine, module, plan, batches, done, hooks, device)
    with engine.whole():
        if first:
            shutil.rmtree(job.work / STUDENT, ignore_errors=True)
            write(job.work / STUDENT)
    barrier(engine)


def _resume(engine: TrainingEngine, folder: Path) -> int:
    newest = None
    if engine.rank == 0:  # alone: it reads every file of the checkpoint
        newest, warnings = checkpoints.newest(folder)
        for warning in warnings:
            logger.warning(warning)
    if engine.world_size > 1:
        shared = [newest]
        dist.broadcast_object_list(shared)
        (newest,) = shared
    if newest is None:
        return 0
    step, _ = checkpoints.read(engine, newest)
    return step


def save(engine: TrainingEngine, folder: Path, step: int, keep: int) -> None:
    """Write a checkpoint on all workers together; it has its name when all of it is there, and `keep` remain."""
    final = folder / checkpoints.name_of(step)
    partial = final.with_suffix(".partial")
    if engine.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier(engine)
    checkpoints.write(engine, partial, step, {})
    barrier(engine)
    if engine.rank == 0:
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that was passed over
        partial.rename(final)
        named = (path for path in folder.iterdir() if checkpoints.NAME.fullmatch(path.name))
        # A later one is damaged: the run was resumed before it.
        older = (path for path in named if checkpoints.step_of(path) <= step)
        for old in sorted(older, key=checkpoints.step_of)[:-keep]:
            shutil.rmtree(old)
