"""`ray job submit`: a job's script from an uploaded working directory, on a cluster that it has not started."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from d3llm_ray.distillation.training.metrics_file import METRICS_FILE, read_metrics
from d3llm_ray.models import load_model, read_configs
from tests.chaos.cluster import Node, free_port
from tests.distillation.rows import SMALL_RUN, write_rows

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def jobs() -> Iterator[JobSubmissionClient]:
    """The jobs' API of a node of its own, with a dashboard."""
    port = free_port()
    options = ["--head", "--port=0", f"--ray-client-server-port={free_port()}"]
    options += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    with tempfile.TemporaryDirectory(prefix="d3-", dir="/tmp") as folder:  # the paths of Unix sockets must be short
        node = Node(Path(folder) / "head", *options)
        try:
            assert node.comes_up(), node.printed
            yield JobSubmissionClient(f"http://127.0.0.1:{port}")
        finally:
            node.kill()


def finish(jobs: JobSubmissionClient, script: str, **settings: object) -> tuple[JobStatus, str]:
    """Submit a script of `jobs/` with these settings; its status at the end, and what it printed."""
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    entrypoint = shlex.join([sys.executable, f"jobs/{script}", *flags])
    job = jobs.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(ROOT)})
    deadline = time.monotonic() + PATIENCE_S
    while not (status := jobs.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline, jobs.get_job_logs(job)
        time.sleep(0.5)
    return status, jobs.get_job_logs(job)


def test_a_submitted_distillation_leaves_a_student(
    jobs: JobSubmissionClient, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    mask_token_id = read_configs(tiny_checkpoint)[1].mask_token_id
    rows = write_rows(tmp_path / "rows", rows=40, canvas=32, vocab_size=4, mask_token_id=mask_token_id)
    output = tmp_path / "student"
    settings = {**SMALL_RUN, "workers": 1, "max_steps": 6, "resource_timeout_s": 60}
    status, printed = finish(jobs, "distill.py", teacher=tiny_checkpoint, trajectories=rows, output=output, **settings)
    assert status == JobStatus.SUCCEEDED, printed
    assert "memory plan of each of 1 workers" in printed and "6/6" in printed
    assert [line["step"] for line in read_metrics(output / METRICS_FILE)] == [1, 2, 3, 4, 5, 6]
    assert load_model(output)[0].config == load_model(tiny_checkpoint)[0].config


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"count": 4, "output": "runs/rel"}, "runs/rel' lies in the package of this Ray job"),
        ({"teacher": "mine/model", "output": "/tmp/rows"}, "files that git ignores are not uploaded"),
    ],
)
def test_a_submitted_job_fails_on_bad_input_with_one_line(
    jobs: JobSubmissionClient, settings: dict[str, object], line: str
) -> None:
    status, printed = finish(jobs, "generate_trajectories.py", **settings)
    assert status == JobStatus.FAILED
    assert line in printed and "Traceback" not in printed
