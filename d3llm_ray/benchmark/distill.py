"""Samples a second of a distillation: a bare PyTorch loop, the Ray job with one worker, and the job with more.

All train on the same micro-batches with the same objective and precision. Each job runs between two loops: what slows a
machine down for a while slows neighbours down alike. The loop is a Ray task, so that it has a worker's environment and
priority (Ray lowers that of its workers), and as many threads. `benchmark step` measures a single step on a device.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ray
import torch
from pydantic import Field, model_validator

from d3llm_ray import cluster
from d3llm_ray.benchmark.files import begin, check, keep
from d3llm_ray.benchmark.rates import RateRow, rate_columns
from d3llm_ray.benchmark.ratios import Ratio
from d3llm_ray.benchmark.report import BenchmarkReport
from d3llm_ray.benchmark.rows import spread
from d3llm_ray.benchmark.step import optimizer_step
from d3llm_ray.config import build
from d3llm_ray.device import timed
from d3llm_ray.distillation.plan import TrainingPlan
from d3llm_ray.distillation.preparation import load
from d3llm_ray.distillation.run import run as run_job
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.student import build_student, student_family
from d3llm_ray.distillation.training.engines import torch_engine
from d3llm_ray.distillation.training.metrics_file import METRICS_FILE, read_metrics
from d3llm_ray.errors import WorkError, require
from d3llm_ray.output_folder import sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.trajectories.pipeline import write_trajectories
from d3llm_ray.trajectories.schema import open_dataset
from d3llm_ray.trajectories.settings import TrajectorySettings

SAME_LOSS = 1e-4  # relative: sums in another order, and bfloat16's kernels for other numbers of threads
LOOP = "loop"

# How every figure is counted, in every report: a number without its rule cannot be compared.
COUNTING = {
    "per_second": "rows trained on in the steps after the first warmup_steps / their seconds",
    "loop": "forward, backward, clipping and AdamW in one process; micro-batches packed beforehand, nothing logged",
    "job of N": "from the metrics of `d3llm-ray distill` with N workers: logging, checkpoints and waiting for batches "
    "are in it; Ray's start, loading, validations and the student's writing are not",
    "over_loop": "seconds of the loop / seconds of the job; those of the loop are the mean of its run before and after",
    "over_one": "seconds of the job of 1 / seconds of the job of N in the same round",
    "ratios": "median, least and greatest over the rounds",
}


class DistillBenchmarkSettings(DistillSettings):
    """Measure samples a second; the settings are those of `d3llm-ray distill`."""

    verb: ClassVar[str] = "benchmark distill"

    trajectories: str = Field("", description="Parquet dataset of trajectories; empty: the teacher decodes a few now")
    output: str = Field("runs/benchmark-distill", description="folder of the report, on storage that all nodes share")
    max_steps: int | None = Field(60, gt=0, description="optimizer steps of each measurement, the first ones included")
    warmup_steps: int = Field(20, gt=0, description="first steps, which are not measured")
    rounds: int = Field(1, gt=0, description="measurements of each kind")

    @model_validator(mode="after")
    def _measured(self) -> DistillBenchmarkSettings:
        if self.warmup_steps % self.log_every:
            raise ValueError(f"warmup_steps: got {self.warmup_steps}; accepted: a multiple of log_every")
        return self

    def of_job(self, trajectories: str, output: str, workers: int) -> DistillSettings:
        """The settings of a measured job."""
        values = {name: getattr(self, name) for name in DistillSettings.model_fields}
        return DistillSettings(**{**values, "trajectories": trajectories, "output": output, "workers": workers})


@dataclass(frozen=True)
class Run:
    """One measurement. `loss` is that of the first step, which is the same wherever the same is computed."""

    name: str
    samples: int
    seconds: float
    loss: float


@sole_writer
def run(settings: DistillBenchmarkSettings, progress: Progress | None = None) -> BenchmarkReport[RateRow]:
    """Measure in every round loop and job by turns, and a loop at the end; write the report.

    Raises:
        InputError: settings or rows that `d3llm-ray distill` refuses, or too few rows for a step behind the warm-up.
        WorkError: loop and job have not computed the same.
    """
    progress = progress or Progress()
    kinds = sorted({1, settings.workers})
    output = Path(settings.output)
    check(settings, output)
    student_family(settings)
    if settings.trajectories:
        open_dataset(settings.trajectories)
    begin(settings, output)
    cluster.connect(min_cpus=settings.workers * settings.cpus_per_actor + settings.workers)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        trajectories = settings.trajectories or _decode(settings, Path(folder) / "trajectories", progress)
        alone = settings.of_job(trajectories, folder, workers=1)
        plan = TrainingPlan(alone, load(alone, *student_family(alone))[0], student_family(alone)[1])
        accepted = f"fewer than the run's {plan.max_steps} steps"
        require(settings.warmup_steps < plan.max_steps, "warmup_steps", settings.warmup_steps, accepted)
        nice, runs = 0, []
        for number in range(settings.rounds):
            for workers in kinds:
                nice, loop = _loop(plan, settings.warmup_steps)
                student = str(Path(folder) / f"job-{number}-{workers}")
                job = _job(settings.of_job(trajectories, student, workers), settings.warmup_steps, progress)
                runs += [loop, job]
        runs.append(_loop(plan, settings.warmup_steps)[1])
    _check_same(runs)
    report = BenchmarkReport(
        benchmark="distill",
        plan=settings.model_dump(mode="json"),
        rows=tuple(_rows(runs)),
        ratios=tuple(ratios(runs)),
        columns=rate_columns("samples"),
        counting=COUNTING,
        environment={"nice": nice, "threads": settings.cpus_per_actor},  # of Ray's workers
    )
    return keep(report, settings, output)


def _rows(runs: Sequence[Run]) -> Iterator[RateRow]:
    for name in dict.fromkeys(run.name for run in runs):
        same = [run for run in runs if run.name == name]
        losses = [run.loss for run in same]
        yield RateRow(name, same[0].samples, tuple(run.seconds for run in same), {"first_losses": losses})


def ratios(runs: Sequence[Run]) -> list[Ratio]:
    """Each job over the loops beside it, and each job of several workers over that of one in its round."""
    over_loop: dict[str, list[float]] = {}
    over_one: dict[str, list[float]] = {}
    alone = 0.0
    for before, job, after in zip(runs[:-2:2], runs[1::2], runs[2::2], strict=True):
        over_loop.setdefault(job.name, []).append((before.seconds + after.seconds) / 2 / job.seconds)
        if job.name == _name(1):
            alone = job.seconds
        else:
            over_one.setdefault(job.name, []).append(alone / job.seconds)
    return [
        *(Ratio("over_loop", name, *spread(values)) for name, values in over_loop.items()),
        *(Ratio("over_one", name, *spread(values)) for name, values in over_one.items()),
    ]


def of_metrics(name: str, lines: Sequence[Mapping[str, Any]], batch_size: int, warmup_steps: int) -> Run:
    """The measurement of a job, from the lines of its metrics file; a line's rate is that since the line before."""
    steps, seconds, last = 0, 0.0, 0
    for line in lines:
        since, last = line["step"] - last, line["step"]
        if last > warmup_steps:
            steps += since
            seconds += since / line["steps_per_second"]
    return Run(name, steps * batch_size, seconds, lines[0]["loss"])


def bare_loop(plan: TrainingPlan, warmup_steps: int) -> Run:
    """Train as the job's one worker does, with nothing around it."""
    settings = plan.settings
    device = torch.device(settings.device)
    if not settings.gpu:
        torch.set_num_threads(settings.cpus_per_actor)
    torch.manual_seed(settings.seed)
    module, _ = build_student(settings, device)
    engine = torch_engine(module, settings.engine_options())
    accumulation = settings.accumulation
    packed = [plan.micro_batch(number) for number in plan.numbers(0, 0, 1)]

    def train(steps: range) -> list[torch.Tensor]:
        shares = ((step, packed[step * accumulation : (step + 1) * accumulation]) for step in steps)
        return [optimizer_step(engine, module, share, plan.lr(step), device) for step, share in shares]

    first, *_ = train(range(warmup_steps))
    seconds, losses = timed(device, lambda: train(range(warmup_steps, plan.max_steps)))
    return Run(LOOP, len(losses) * settings.batch_size, seconds, first.item())


def _loop(plan: TrainingPlan, warmup_steps: int) -> tuple[int, Run]:
    """(niceness, measurement) of the loop in a process of Ray's."""
    settings = plan.settings

    def measure() -> tuple[int, Run]:
        return os.nice(0), bare_loop(plan, warmup_steps)

    task = ray.remote(num_cpus=settings.cpus_per_actor, num_gpus=int(settings.gpu), max_calls=1)(measure)
    measured: tuple[int, Run] = ray.get(task.remote())
    return measured


def _job(settings: DistillSettings, warmup_steps: int, progress: Progress) -> Run:
    lines = read_metrics(run_job(settings, progress) / METRICS_FILE)
    return of_metrics(_name(settings.workers), lines, settings.batch_size, warmup_steps)


def _name(workers: int) -> str:
    return f"job of {workers}"


def _decode(settings: DistillBenchmarkSettings, output: Path, progress: Progress) -> str:
    """Let the teacher decode as many rows as the steps take."""
    steps = settings.max_steps or 1
    count = settings.batch_size * -(-steps // settings.epochs)
    values = {"teacher": settings.teacher, "count": count, "output": str(output)}
    write_trajectories(build(TrajectorySettings, values), progress)
    return str(output)


def _check_same(runs: Sequence[Run]) -> None:
    """All have the same first loss, unless they do not train on the same."""
    losses = torch.tensor([run.loss for run in runs], dtype=torch.float64)
    if not torch.allclose(losses, losses[:1], rtol=SAME_LOSS, atol=0.0):
        raise WorkError(f"first losses that differ: {', '.join(f'{run.name} {run.loss:.6g}' for run in runs)}")
