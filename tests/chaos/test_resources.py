"""A resumed job on a cluster whose CPUs another job holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from d3llm_ray.trajectories.settings import TrajectorySettings
from tests.chaos.cluster import Cluster
from tests.chaos.job import Job

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400, func_only=True)]
LIMIT_S = 15.0
STARTUP_S = 60.0  # of a driver on a busy machine
HOLDER = """
import time, ray
ray.init(log_to_driver=False)
ray.get(ray.util.placement_group([{"CPU": 1}] * 4).ready())
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def held_cpus(cluster: Cluster) -> Iterator[None]:
    """Another job has four of the six CPUs."""
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            yield
        finally:
            holder.kill()


def test_resume_without_room_ends_in_time(cluster: Cluster, job: Job) -> None:
    job.start()
    job.wait_for(lambda: job.done() > 20)
    job.kill_driver()
    with held_cpus(cluster):
        began = time.monotonic()
        job.start(resource_timeout_s=LIMIT_S)
        assert job.wait() == 2, job.printed
    assert LIMIT_S < time.monotonic() - began < LIMIT_S + STARTUP_S
    assert re.search(r"actors: .* within 15 s: 3 CPU \(2 CPU free of 6 CPU\)", job.said), job.printed


def test_waiting_for_resources_ends_within_two_minutes_by_default() -> None:
    assert TrajectorySettings.model_fields["resource_timeout_s"].default < 120
