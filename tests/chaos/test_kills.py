"""SIGKILL to teacher actors, to a node and to the driver: every row once, the same, at a bounded price."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.chaos.cluster import Cluster
from tests.chaos.command import Figures
from tests.chaos.job import INCOMPLETE, Expected, Job
from tests.chaos.watcher import Watcher

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400, func_only=True)]
ACTOR_KILLS, EVERY_S = 4, 5.0


def finish(
    job: Job, fault: str, kills: int, expected: Expected, watcher: Watcher, undisturbed_seconds: float, folder: Path
) -> None:
    """Check what the job left behind, and report what the fault cost."""
    job.assert_complete(expected, watcher)
    rows = len(expected.rows) + len(expected.failing)
    Figures(fault, kills, rows, job.recomputed(), job.seconds, undisturbed_seconds).report(folder)


def test_killed_teacher_actors(
    job: Job, watcher: Watcher, expected: Expected, undisturbed_seconds: float, tmp_path: Path
) -> None:
    rng, due = random.Random(1), 0.0
    killed: list[int] = []
    job.start()
    while job.running and len(killed) < ACTOR_KILLS:
        if time.monotonic() >= due and (busy := job.busy()):
            killed.append(rng.choice(sorted(busy)))
            os.kill(killed[-1], signal.SIGKILL)
            due = time.monotonic() + EVERY_S
        time.sleep(0.05)
    assert job.wait() == INCOMPLETE, job.printed
    assert len(killed) >= 3
    assert 0 < job.recomputed() <= len(killed) * job.settings.rows_per_block
    finish(job, "a teacher actor killed", len(killed), expected, watcher, undisturbed_seconds, tmp_path)


def test_killed_node(
    cluster: Cluster, job: Job, watcher: Watcher, expected: Expected, undisturbed_seconds: float, tmp_path: Path
) -> None:
    job.start()
    job.wait_for(lambda: job.done() >= len(expected.rows) // 3)
    job.wait_for(lambda: any(node.pids() & job.busy() for node in cluster.workers))
    victim = max(cluster.workers, key=lambda node: len(node.pids() & job.busy()))
    actors = victim.pids() & job.teachers()
    victim.kill()
    assert job.wait() == INCOMPLETE, job.printed
    assert not actors & job.teachers()
    assert job.recomputed() <= len(actors) * job.settings.rows_per_block
    finish(job, "one of three nodes killed", 1, expected, watcher, undisturbed_seconds, tmp_path)


def test_killed_driver(
    job: Job, watcher: Watcher, expected: Expected, undisturbed_seconds: float, tmp_path: Path
) -> None:
    """While it stages the prompts, three times while the teachers work, and while it publishes."""
    rng, rows = random.Random(2), len(expected.rows)
    staging, published = job.output / "_staging", job.output / "trajectories-00000.parquet"
    thresholds = [rng.randrange(third * rows // 3, (third + 1) * rows // 3) for third in range(3)]
    moments = [
        staging.exists,
        *(lambda threshold=threshold: job.done() > threshold for threshold in thresholds),
        published.exists,
    ]
    for moment in moments:
        job.start()
        job.wait_for(moment, every_s=0.001)
        job.kill_driver()
        assert not (job.output / "_SUCCESS").exists()
    job.start()
    assert job.wait() == INCOMPLETE, job.printed
    # Staging and publishing cost no row.
    assert job.recomputed() <= len(thresholds) * job.settings.actors * job.settings.rows_per_block
    finish(job, "the driver killed", len(moments), expected, watcher, undisturbed_seconds, tmp_path)
