"""SIGTERM, as `ray job stop` and schedulers send it, and Ctrl-C, while a distillation runs on an embedded cluster."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d3llm_ray.distillation.training.metrics_file import METRICS_FILE, read_metrics
from d3llm_ray.models import read_configs
from tests.distillation.rows import SMALL_RUN, write_rows

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_one_line_and_keeps_what_is_finished(
    number: signal.Signals, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    mask_token_id = read_configs(tiny_checkpoint)[1].mask_token_id
    rows = write_rows(tmp_path / "rows", rows=40, canvas=32, vocab_size=4, mask_token_id=mask_token_id)
    settings = {**SMALL_RUN, "workers": 1, "epochs": 1000, "checkpoint_every": 5}
    paths = {"teacher": tiny_checkpoint, "trajectories": rows, "output": tmp_path / "student"}
    flags = [word for name, value in (settings | paths).items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "d3llm_ray.cli", "distill", *flags]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as job:
        deadline = time.monotonic() + PATIENCE_S
        while not list(tmp_path.glob(".student.*/checkpoints/step-??????")):
            assert job.poll() is None and time.monotonic() < deadline, job.communicate()[1]
            time.sleep(0.2)
        job.send_signal(number)
        printed = job.communicate(timeout=PATIENCE_S)[1]
    assert job.returncode == 130, printed
    said = [line for line in printed.splitlines() if line.startswith("d3llm-ray: ")]  # Ray may print behind it
    assert len(said) == 1 and said[0].startswith("d3llm-ray: interrupted; what is finished is kept"), printed
    assert "SIGTERM received" not in printed and "Traceback" not in printed
    (work,) = tmp_path.glob(".student.*")
    assert read_metrics(work / METRICS_FILE)
    assert not (tmp_path / "student").exists()
