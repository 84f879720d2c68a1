"""`run(settings)`: check, train on Ray, and put the finished student in place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from d3llm_ray import cluster
from d3llm_ray.config import build, read_yaml, to_yaml
from d3llm_ray.distillation.data import load_samples
from d3llm_ray.distillation.metrics_file import read_metrics
from d3llm_ray.distillation.plan import Plan
from d3llm_ray.distillation.plot import plot_loss
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.train import train_worker
from d3llm_ray.errors import InputError, require
from d3llm_ray.models import read_configs, resolve_model
from d3llm_ray.progress import Progress, polled

SETTINGS_FILE = "settings.yaml"
METRICS_FILE = "metrics.jsonl"


def run(settings: DistillSettings, progress: Progress | None = None) -> Path:
    """Distil a student and return its folder: checkpoint, tokenizer, settings, metrics and loss plot.

    The folder appears when all of it is complete. An interrupted run leaves a hidden folder beside it, from whose
    newest checkpoint the same call continues; a finished one returns at once. Raises `InputError` for bad settings
    or rows, before Ray starts, and `ray.train.TrainingFailedError` when workers fail more than `max_failures` times.
    """
    settings = _absolute(settings)
    output = Path(settings.output)
    if _finished(output, settings):
        return output
    plan = check(settings)
    progress = progress or Progress()
    cluster.connect()
    _check_resources(settings)
    work = output.with_name(f".{output.name}.{fingerprint(settings, plan)}.partial")
    work.mkdir(parents=True, exist_ok=True)
    config = {
        "settings": settings.model_dump(mode="json"),
        "metrics": str(work / METRICS_FILE),
        "student": str(work / "student"),
    }
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if settings.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.use_gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if settings.use_gpu else {})},
        ),
        # The same name in the same place resumes: the folder's name holds the fingerprint of everything that matters.
        run_config=RunConfig(
            name="ray",
            storage_path=str(work),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    with _watched(work / METRICS_FILE, plan.max_steps, progress):
        trainer.fit()
    _settle(work, output, settings)
    return output


def check(settings: DistillSettings) -> Plan:
    """Read the teacher's configuration and the rows; `InputError` for anything that training would stumble over."""
    config, family = read_configs(settings.teacher)
    require(family.mask_token_id is not None, "teacher", settings.teacher, "a masked-diffusion model, not a causal one")
    samples = load_samples(settings.trajectories, keep=settings.keep, max_rows=settings.max_rows)
    samples.check(config, family)
    return Plan(settings, samples)


def fingerprint(settings: DistillSettings, plan: Plan) -> str:
    """Name of what a run computes: its settings, the teacher's files and the rows' ids."""
    teacher = resolve_model(settings.teacher)
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in teacher.iterdir())
    known = json.dumps([settings.model_dump(mode="json"), str(teacher), files, plan.samples.prompt_ids])
    return hashlib.sha256(known.encode()).hexdigest()[:12]


def _absolute(settings: DistillSettings) -> DistillSettings:
    """Paths that mean the same in a worker, whose working directory is another."""
    teacher = settings.teacher
    if Path(teacher).is_dir():
        teacher = str(Path(teacher).absolute())
    rows = settings.trajectories
    if "://" not in rows:
        rows = str(Path(rows).absolute())
    output = str(Path(settings.output).absolute())
    changed = {"teacher": teacher, "trajectories": rows, "output": output}
    return settings.model_copy(update=changed)


def _finished(output: Path, settings: DistillSettings) -> bool:
    if not output.exists():
        return False
    file = output / SETTINGS_FILE
    if file.is_file() and build(DistillSettings, read_yaml(file)) == settings:
        return True
    raise InputError(f"output: {str(output)!r} exists and is not this run's; accepted: a folder that does not exist")


def _check_resources(settings: DistillSettings) -> None:
    """Refuse at once what an embedded cluster can never give; a real one may still grow."""
    if os.environ.get("RAY_ADDRESS"):
        return
    have = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for kind, each in (("CPU", settings.cpus_per_worker), ("GPU", int(settings.use_gpu))):
        total = int(have.get(kind, 0))
        accepted = f"at most {total // max(each, 1)}: this machine has {total} {kind}s and a worker takes {each}"
        require(settings.workers * each <= total, "workers", settings.workers, accepted)


@contextmanager
def _watched(metrics: Path, max_steps: int, progress: Progress) -> Iterator[None]:
    """Show the run's progress from its metrics file while the body runs."""

    def show() -> None:
        lines = read_metrics(metrics)
        if lines:
            last = lines[-1]
            progress.update(last["step"], loss=last["loss"], window=last["window"], right=last["right"])

    progress.start("distill", max_steps, "step")
    try:
        with polled(show):
            yield
    finally:
        show()
        progress.finish()


def _settle(work: Path, output: Path, settings: DistillSettings) -> None:
    """Complete the student's folder and give it its name."""
    student = work / "student"
    shutil.copyfile(work / METRICS_FILE, student / METRICS_FILE)
    plot_loss(read_metrics(work / METRICS_FILE), student / "loss.png")
    (student / SETTINGS_FILE).write_text(to_yaml(settings))
    student.rename(output)
    for superseded in output.parent.glob(f".{output.name}.*.partial"):  # this run's, and any left by other settings
        shutil.rmtree(superseded)
