"""Rows a second of a teacher: one prompt at a time, in a batch, as a Ray job, and as a job with more actors.

All decode the same prompts and must give the same rows. Loading and Ray's start are left out everywhere.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from d3llm_ray.benchmark.files import begin, keep
from d3llm_ray.benchmark.rates import RateRow, rate_columns
from d3llm_ray.benchmark.ratios import Ratio
from d3llm_ray.benchmark.report import BenchmarkReport
from d3llm_ray.device import timed
from d3llm_ray.output_folder import sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.trajectories.pipeline import write_trajectories
from d3llm_ray.trajectories.plan import make_plan
from d3llm_ray.trajectories.prompts import Prompt
from d3llm_ray.trajectories.schema import TrajectoryRow, read_trajectories
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.sources import Source
from d3llm_ray.trajectories.teacher import Teacher

# How every figure is counted, in every report: a number without its rule cannot be compared.
COUNTING = {
    "per_second": "prompts / seconds; loading and Ray's start are not in it",
    "single": "a loop over one teacher in this process, a prompt at a time",
    "loop": "the same in batches",
    "job of N": "`d3llm-ray trajectories` with N actors, from when they are ready to the last row",
    "identical_rows": "rows with the tokens, reveal steps and forwards that the loop's have",
    "over_loop": "seconds of the loop / seconds of this way, measured once",
}


class TrajectoryBenchmarkSettings(TrajectorySettings):
    """Measure rows a second; the settings are those of `d3llm-ray trajectories`."""

    verb: ClassVar[str] = "benchmark trajectories"

    count: int | None = Field(256, ge=1, description="prompts to decode in each measurement")
    attempts: int = Field(1, ge=1, description="decodings of a prompt at most")
    output: str = Field("runs/benchmark-trajectories", description="folder of the report, on storage that nodes share")
    single: bool = Field(True, description="also decode one prompt at a time, which is slow on a GPU")


@sole_writer
def run(settings: TrajectoryBenchmarkSettings, progress: Progress | None = None) -> BenchmarkReport[RateRow]:
    """Measure every way once, and write the report: rows a second, their ratios, and whether the rows agree."""
    plan = make_plan(settings)
    prompts, progress = list(plan.prompts()), progress or Progress()
    output = Path(settings.output)
    begin(settings, output)
    measured: dict[str, tuple[float, list[Any]]] = {}
    if settings.single:
        measured["single"] = _loop(settings, plan.source, prompts, batch_size=1)
    measured["loop"] = _loop(settings, plan.source, prompts, settings.max_batch_size)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        for actors in sorted({1, settings.actors}):
            measured[f"job of {actors}"] = _job(settings, str(Path(folder) / f"actors-{actors}"), actors, progress)
    report = BenchmarkReport(
        benchmark="trajectories",
        plan=settings.model_dump(mode="json"),
        rows=tuple(_rows(measured)),
        ratios=tuple(_over_loop(measured)),
        columns=(*rate_columns("rows"), ("identical rows", lambda row: str(row.facts["identical_rows"]))),
        counting=COUNTING,
    )
    return keep(report, settings, output)


def _rows(measured: Mapping[str, tuple[float, list[Any]]]) -> Iterator[RateRow]:
    reference = measured["loop"][1]
    for name, (seconds, rows) in measured.items():
        identical = sum(row == other for row, other in zip(rows, reference, strict=True))
        yield RateRow(name, len(rows), (seconds,), {"identical_rows": identical})


def _over_loop(measured: Mapping[str, tuple[float, list[Any]]]) -> Iterator[Ratio]:
    for name, (seconds, _) in measured.items():
        if name != "loop":
            yield Ratio("over_loop", name, *[measured["loop"][0] / seconds] * 3)


def _loop(
    settings: TrajectorySettings, source: Source, prompts: Sequence[Prompt], batch_size: int
) -> tuple[float, list[Any]]:
    """(seconds, rows) of a plain loop over one teacher in this process, after one row to warm up."""
    teacher = Teacher(settings.model_copy(update={"max_batch_size": batch_size}), source.task)
    teacher.rows(prompts[:1])
    seconds, rows = timed(torch.device(settings.device), lambda: teacher.rows(prompts))
    return seconds, [_decoded(row) for row in rows]


def _job(
    settings: TrajectoryBenchmarkSettings, output: str, actors: int, progress: Progress
) -> tuple[float, list[Any]]:
    """(seconds, rows) of the Ray job, from when its actors are ready to the last row."""
    values = {name: getattr(settings, name) for name in TrajectorySettings.model_fields}
    write_trajectories(TrajectorySettings(**{**values, "output": output, "actors": actors, "keep": "all"}), progress)
    summary = json.loads((Path(output) / "summary.json").read_text())
    rows = read_trajectories(output, columns=["response_ids", "reveal_step", "forwards"]).to_pylist()
    return summary["seconds"], [_decoded(row) for row in rows]


def _decoded(row: TrajectoryRow) -> tuple[list[int], list[int], int]:
    return row["response_ids"], row["reveal_step"], row["forwards"]
