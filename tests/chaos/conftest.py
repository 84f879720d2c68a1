"""The cluster of three nodes, the job that is attacked on it, and what an undisturbed run of it gives."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d3llm_ray.config import build
from d3llm_ray.tasks import EMBEDDED
from d3llm_ray.trajectories.plan import make_plan
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.teacher import Teacher
from tests.chaos.cluster import Cluster
from tests.chaos.job import INCOMPLETE, Expected, Job
from tests.chaos.watcher import Watcher

GOOD, POISONED = 78, 2  # prompts, and those among them that exceed the model's context
BASE = {
    "max_tokens": 32,
    "attempts": 2,
    "actors": 2,
    "max_batch_size": 8,
    "rows_per_block": 16,
    "rows_per_file": 10,
    "resource_timeout_s": 60.0,
}


@pytest.fixture(scope="session")
def nodes() -> Iterator[Cluster]:
    """A head and two workers. This process never joins them: its own Ray is the other tests'."""
    with tempfile.TemporaryDirectory(prefix="d3-", dir="/tmp") as folder:  # the paths of Unix sockets must be short
        cluster = Cluster(Path(folder), workers=2)
        try:
            cluster.restore()
            yield cluster
        finally:
            cluster.close()


@pytest.fixture
def cluster(nodes: Cluster) -> Cluster:
    """Three living nodes, whatever the test before has done."""
    nodes.restore()
    return nodes


@pytest.fixture(scope="session")
def base(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of the job, but for its output."""
    problems = list(EMBEDDED["arith"].problems("train", GOOD + POISONED))
    lines = []
    for number, problem in enumerate(problems):
        poison = number % (len(problems) // POISONED) == 7
        messages = [{"role": "user", "content": "apples " * 300 + str(number)}] if poison else problem.messages
        lines.append(json.dumps({"messages": messages, "reference": problem.reference}) + "\n")
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    prompts.write_text("".join(lines))
    return {**BASE, "teacher": str(tiny_checkpoint), "prompts": str(prompts)}


@pytest.fixture(scope="session")
def expected(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """Of one teacher in this process, without Ray, that decodes one prompt after another."""
    settings = build(
        TrajectorySettings, {**base, "max_batch_size": 1, "output": str(tmp_path_factory.mktemp("unused"))}
    )
    plan = make_plan(settings)
    teacher = Teacher(settings, plan.source.task)
    rows, failing = [], []
    for prompt in plan.prompts():
        teacher.submit([prompt])
        finished: list[dict[str, Any]] = []
        while not finished:
            finished = teacher.step()
        row = finished[0]
        if "error" in row:
            failing.append(row["prompt_id"])
            continue
        del row["row"]
        # As Parquet keeps them.
        row["temperature"] = float(np.float32(row["temperature"]))
        row["reference_ids"] = None  # of imported rows only
        row["reveal_entropy"] = [float(np.float16(value)) for value in row["reveal_entropy"]]
        rows.append(row)
    assert len(failing) == POISONED
    return Expected(rows, failing)


@pytest.fixture(scope="session")
def undisturbed_seconds(
    nodes: Cluster, base: dict[str, Any], expected: Expected, tmp_path_factory: pytest.TempPathFactory
) -> float:
    """How long the job takes when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Job(nodes, build(TrajectorySettings, {**base, "output": str(folder / "out")}), folder)
    with job, Watcher(job.output, [row["prompt_id"] for row in expected.rows]) as watcher:
        job.start()
        assert job.wait() == INCOMPLETE, job.printed
    job.assert_complete(expected, watcher)
    assert job.recomputed() == 0
    return job.seconds


@pytest.fixture
def job(cluster: Cluster, base: dict[str, Any], tmp_path: Path) -> Iterator[Job]:
    settings = build(TrajectorySettings, {**base, "output": str(tmp_path / "out")})
    with Job(cluster, settings, tmp_path) as job:
        yield job


@pytest.fixture
def watcher(job: Job, expected: Expected) -> Iterator[Watcher]:
    """Looks at the job's output for as long as the test runs."""
    with Watcher(job.output, [row["prompt_id"] for row in expected.rows]) as watcher:
        yield watcher
