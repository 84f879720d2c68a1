"""What a run does before its first step and after its last one, wherever the steps are taken."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from d3llm_ray.config import build, to_yaml
from d3llm_ray.distillation.data import TrajectorySet, read_rows
from d3llm_ray.distillation.lora import coverage
from d3llm_ray.distillation.memory import plan_of
from d3llm_ray.distillation.plan import TrainingPlan
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.student import student_family, with_adapters
from d3llm_ray.distillation.training import checkpoints
from d3llm_ray.distillation.training.job import CHECKPOINTS, STUDENT, Job
from d3llm_ray.distillation.training.metrics_file import METRICS_FILE, read_metrics
from d3llm_ray.distillation.training.trackers import TENSORBOARD
from d3llm_ray.distillation.training.validation import BEST, validation_decoder, validation_problems
from d3llm_ray.errors import InputError, require
from d3llm_ray.models import Family, ModelConfig, Transformer, load_tokenizer, resolve_model
from d3llm_ray.models.checkpoint import fingerprint
from d3llm_ray.progress import Progress, polled
from d3llm_ray.report import can_plot, check_output
from d3llm_ray.tasks import load_task
from d3llm_ray.yaml_file import read_yaml

SETTINGS_FILE, LAST = "settings.yaml", "last"
FINGERPRINT_CHARACTERS = 12  # 48 bits

# How a run is carried out, not what it computes: a resumed run may change these.
HOW = {"workers", "device", "cpus_per_actor", "zero_stage", "offload", "activation_checkpointing", "head_rows"}
HOW |= {"resource_timeout_s", "checkpoint_every", "keep_checkpoints", "max_failures", "log_every"}


def finished(settings: DistillSettings) -> Path | None:
    """The student's folder when an earlier run has completed it; `InputError` when the name is taken."""
    output = Path(settings.output).absolute()
    check_output(output, "output", folder=True)
    if not os.path.lexists(output):
        return None
    file = output / SETTINGS_FILE
    if file.is_file() and _what(build(DistillSettings, read_yaml(file, "output"))) == _what(absolute(settings)):
        return output
    raise InputError(f"output: {str(output)!r} exists and is not this run's; accepted: a folder that does not exist")


def prepare(settings: DistillSettings, progress: Progress) -> Job:
    """Check everything that training would stumble over, print what will be trained, and make the work folder.

    Raises `InputError`. The work folder lies beside the output and is named by what the run computes: an interrupted
    run finds its checkpoints there again.
    """
    settings = absolute(settings)
    shape, family = student_family(settings)
    samples, held_out = load(settings, shape, family, progress)
    plan = TrainingPlan(settings, samples, family)
    if settings.val_task is not None and settings.val_every is not None:
        validation_problems(load_task(settings.val_task), settings.val_count)
        validation_decoder(settings).check(family)
        spoken = load_tokenizer(settings.teacher, family) is not None
        require(spoken, "val_task", settings.val_task, f"null, as {settings.teacher!r} has no tokenizer")
    progress.note(describe(settings, shape, samples))
    output = Path(settings.output)
    work = output.with_name(f".{output.name}.{run_fingerprint(settings, plan)}.partial")
    work.mkdir(parents=True, exist_ok=True)
    newest, warnings = checkpoints.newest(work / CHECKPOINTS)
    for warning in warnings:
        progress.note(f"warning: {warning}")
    if newest is not None:
        progress.note(f"resuming behind step {checkpoints.step_of(newest)} of {plan.max_steps}")
    return Job(settings, plan, held_out, work)


def load(
    settings: DistillSettings, shape: ModelConfig, family: Family, progress: Progress | None = None
) -> tuple[TrajectorySet, TrajectorySet]:
    """The rows to train on and those to validate on, checked; `progress` is told of what is left out or cut."""
    rows = read_rows(
        settings.trajectories,
        keep=settings.keep,
        target=settings.target,
        max_length=settings.max_length,
        max_rows=settings.max_rows,
        held_out=settings.held_out,
    )
    train, held_out = (
        TrajectorySet(
            table,
            target=settings.target,
            canvas=settings.canvas,
            max_length=settings.max_length,
            pad_token_id=family.eos_token_id,
        )
        for table in (rows.train, rows.held_out)
    )
    for samples in (train, held_out):
        samples.check(shape, family, ordered=settings.objective.needs_order)
    if progress is not None:
        cut = train.cut(family.stop_token_ids)
        left_out = [f"{count} {reason}" for reason, count in rows.left_out.items() if count]
        parts = [f"{len(train)} rows to train on"]
        parts += [f"left out: {', '.join(left_out)}"] if left_out else []
        parts += [f"{np.count_nonzero(cut)} answers cut, by {cut.sum()} tokens in all"] if cut.any() else []
        progress.note("; ".join(parts))
    return train, held_out


def describe(settings: DistillSettings, shape: ModelConfig, samples: TrajectorySet) -> str:
    """Which weights are trained, and the memory a worker needs; `InputError` for adapters that fit nothing."""
    with torch.device("meta"):
        model = with_adapters(Transformer(shape), settings)
    plan = plan_of(settings, shape, int(samples.lengths.max()))
    return f"{coverage(model)}\n{plan}"


def run_fingerprint(settings: DistillSettings, plan: TrainingPlan) -> str:
    """Name of what a run computes: its settings, the teacher's files and the rows' ids."""
    teacher = resolve_model(settings.teacher)
    known = json.dumps([_what(settings), str(teacher), fingerprint(teacher), plan.samples.prompt_ids.tolist()])
    return hashlib.sha256(known.encode()).hexdigest()[:FINGERPRINT_CHARACTERS]


def _what(settings: DistillSettings) -> dict[str, object]:
    return settings.model_dump(mode="json", exclude=HOW)


def absolute(settings: DistillSettings) -> DistillSettings:
    """Paths that mean the same in a worker, whose working directory is another."""
    changed = {"output": str(Path(settings.output).absolute())}
    for name in ("teacher", "val_decoder", "val_task"):
        value = getattr(settings, name)
        if value is not None and Path(value).exists():
            changed[name] = str(Path(value).absolute())
    if "://" not in settings.trajectories:
        changed["trajectories"] = str(Path(settings.trajectories).absolute())
    return settings.model_copy(update=changed)


@contextmanager
def watched(job: Job, progress: Progress) -> Iterator[None]:
    """Show the run's progress from its metrics file while the body runs."""
    metrics = job.work / METRICS_FILE

    def show() -> None:
        lines = read_metrics(metrics)
        if lines:
            last = lines[-1]
            named = {name: last[name] for name in ("loss", "right", "val_loss", "val_accuracy") if name in last}
            progress.update(last["step"], **named)

    with progress.stage("distill", job.plan.max_steps, "step"):
        try:
            with polled(show):
                yield
        finally:
            show()


def settle(job: Job) -> Path:
    """Complete the student's folder and give it its name."""
    work, settings = job.work, job.settings
    student, best, output = work / STUDENT, work / BEST, Path(settings.output)
    if best.is_dir():
        if settings.export == "best":
            student, best = best, student
        best.rename(student / (LAST if settings.export == "best" else BEST))
    shutil.copyfile(work / METRICS_FILE, student / METRICS_FILE)
    if (work / TENSORBOARD).is_dir():
        shutil.copytree(work / TENSORBOARD, student / TENSORBOARD, dirs_exist_ok=True)
    if can_plot(output / "loss.png"):
        from d3llm_ray.distillation.training.plots import plot_loss

        plot_loss(read_metrics(work / METRICS_FILE), student / "loss.png")
    (student / SETTINGS_FILE).write_text(to_yaml(settings))
    student.rename(output)
    for folder in work_folders(output):
        shutil.rmtree(folder)
    return output


def work_folders(output: Path) -> list[Path]:
    """What runs of any settings that interruptions have stopped have left beside `output`."""
    name = re.compile(rf"\.{re.escape(output.name)}\.[0-9a-f]{{{FINGERPRINT_CHARACTERS}}}\.partial")
    return sorted(path for path in output.parent.iterdir() if name.fullmatch(path.name) and path.is_dir())
