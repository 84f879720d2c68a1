"""Rows a second of a teacher: one prompt at a time, in a batch, as a Ray job, and as a job with more actors.

All decode the same prompts and must give the same rows. Loading and Ray's start are left out everywhere.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from d3llm_ray.device import timed
from d3llm_ray.progress import Progress
from d3llm_ray.trajectories.pipeline import run as run_job
from d3llm_ray.trajectories.plan import make_plan
from d3llm_ray.trajectories.prompts import Prompt
from d3llm_ray.trajectories.schema import read_trajectories
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.sources import Source
from d3llm_ray.trajectories.teacher import Row, Teacher


class BenchmarkSettings(TrajectorySettings):
    """Measure rows a second; the settings are those of `d3llm-ray trajectories`."""

    verb: ClassVar[str] = "trajectories benchmark"

    count: int | None = Field(256, ge=1, description="prompts to decode in each measurement")
    attempts: int = Field(1, ge=1, description="decodings of a prompt at most")
    output: str = Field("", description="folder of the jobs' rows; empty: a temporary one")
    single: bool = Field(True, description="also decode one prompt at a time, which is slow on a GPU")


def run(settings: BenchmarkSettings, progress: Progress | None = None) -> str:
    """Measure; returns one line of JSON: rows a second of each way, their ratios, and whether the rows agree."""
    plan = make_plan(settings)
    prompts, progress = list(plan.prompts()), progress or Progress()
    measured: dict[str, tuple[float, list[Any]]] = {}
    if settings.single:
        measured["single"] = _loop(settings, plan.source, prompts, batch_size=1)
    measured["loop"] = _loop(settings, plan.source, prompts, settings.max_batch_size)
    with tempfile.TemporaryDirectory() as folder:
        for actors in sorted({1, settings.actors}):
            output = str(Path(settings.output or folder) / f"actors-{actors}")
            measured[f"job of {actors}"] = _job(settings, output, actors, progress)
    rates = {name: round(len(prompts) / seconds, 3) for name, (seconds, _) in measured.items()}
    reference = measured["loop"][1]
    return json.dumps(
        {
            "rows": len(prompts),
            "rows_per_second": rates,
            "over_loop": {name: round(rate / rates["loop"], 3) for name, rate in rates.items()},
            "identical_rows": {
                name: sum(one == other for one, other in zip(rows, reference, strict=True))
                for name, (_, rows) in measured.items()
            },
            "settings": settings.model_dump(mode="json"),
            "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__},
        }
    )


def _loop(
    settings: TrajectorySettings, source: Source, prompts: Sequence[Prompt], batch_size: int
) -> tuple[float, list[Any]]:
    """(seconds, rows) of a plain loop over one teacher in this process, after one row to warm up."""
    teacher = Teacher(settings.model_copy(update={"max_batch_size": batch_size}), source.task)
    teacher.rows(prompts[:1])
    seconds, rows = timed(torch.device(settings.device), lambda: teacher.rows(prompts))
    return seconds, [_decoded(row) for row in rows]


def _job(settings: BenchmarkSettings, output: str, actors: int, progress: Progress) -> tuple[float, list[Any]]:
    """(seconds, rows) of the Ray job, from when its actors are ready to the last row."""
    values = {name: getattr(settings, name) for name in TrajectorySettings.model_fields}
    run_job(TrajectorySettings(**{**values, "output": output, "actors": actors, "keep": "all"}), progress)
    summary = json.loads((Path(output) / "summary.json").read_text())
    rows = read_trajectories(output, columns=["response_ids", "reveal_step", "forwards"]).to_pylist()
    return summary["seconds"], [_decoded(row) for row in rows]


def _decoded(row: Row) -> tuple[list[int], list[int], int]:
    return row["response_ids"], row["reveal_step"], row["forwards"]
