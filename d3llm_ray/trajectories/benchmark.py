"""Rows a second of one teacher, decoding one prompt at a time and in a batch, in one run on one machine.

    python -m d3llm_ray.trajectories.benchmark --teacher tiny-llada --count 64 --batch-size 32

Both runs decode the same prompts once each, after one warm-up row, and must return the same rows. The last line of
stdout is a JSON object.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any

import torch

from d3llm_ray.config import parse, to_yaml
from d3llm_ray.errors import InputError
from d3llm_ray.timing import timed
from d3llm_ray.trajectories.plan import Plan, make_plan
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.teacher import Teacher

DEFAULTS = ["--count", "64", "--attempts", "1"]  # what is named on the command line later wins


def rate(plan: Plan, batch_size: int) -> tuple[float, list[dict[str, Any]]]:
    """(rows a second, rows) of one teacher that decodes `batch_size` rows at a time."""
    teacher = Teacher(plan.settings.model_copy(update={"batch_size": batch_size}), plan.task)
    teacher.rows(plan.prompts[:1])
    seconds, rows = timed(torch.device(plan.settings.device), lambda: teacher.rows(plan.prompts))
    return len(rows) / seconds, rows


def compare(settings: TrajectorySettings) -> dict[str, Any]:
    """Measure both, and say whether every token and reveal step is the same."""
    plan = make_plan(settings)
    single, single_rows = rate(plan, batch_size=1)
    batched, batched_rows = rate(plan, batch_size=settings.batch_size)
    columns = ("response_ids", "reveal_step", "forwards")
    same = sum(
        all(one.get(name) == other.get(name) for name in columns)
        for one, other in zip(single_rows, batched_rows, strict=True)
    )
    return {
        "rows": len(plan.prompts),
        "batch_size": settings.batch_size,
        "rows_per_second_single": round(single, 3),
        "rows_per_second_batched": round(batched, 3),
        "speedup": round(batched / single, 2),
        "identical_rows": same,
        "settings": settings.model_dump(mode="json"),
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__},
    }


def main() -> int:
    try:
        argv = [*DEFAULTS, *sys.argv[1:]]
        settings, print_only = parse(TrajectorySettings, argv, prog="python -m d3llm_ray.trajectories.benchmark")
        print(to_yaml(settings) if print_only else json.dumps(compare(settings)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
