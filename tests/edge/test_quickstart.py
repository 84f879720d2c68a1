"""The whole pipeline, small, from the command line; each stage then finds its output complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from d3llm_ray.config import parse, read_yaml
from d3llm_ray.decoding import DiffusionLLM, decoder
from d3llm_ray.distillation.run import run as distill
from d3llm_ray.evaluation.run import run as evaluate
from d3llm_ray.models import load_model
from d3llm_ray.progress import Progress
from d3llm_ray.quickstart.settings import QuickstartSettings
from d3llm_ray.trajectories.pipeline import run as write_trajectories
from d3llm_ray.trajectories.schema import read_trajectories
from d3llm_ray.tuning.run import run as tune

QUIET = Progress(quiet=True)
ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SMALL = [
    "--rows", "64", "--count", "24", "--trials", "2",
    "--trajectories", "attempts=1", "--distill", "max_steps=4", "--tune", "count=8",
]  # fmt: skip


def _quickstart(output: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "d3llm_ray.cli", "quickstart", "--output", str(output), *SMALL],
        cwd=ROOT, capture_output=True, text=True, timeout=420, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_stage_leaves_its_output_and_is_skipped_when_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "quickstart"
    table = _quickstart(output)
    rows = [
        line.split("|")[1:3] for line in table.splitlines() if line.startswith("| tiny-llada") or "| student" in line
    ]
    assert [tuple(cell.strip() for cell in row) for row in rows] == [
        ("tiny-llada", "vanilla"),
        ("tiny-llada", "d3llm"),
        ("tiny-llada", "d3llm (tuned)"),
        ("student", "d3llm-nocache"),
        ("student", "d3llm (tuned)"),
    ]
    report = json.loads((output / "report.json").read_text())
    assert all(row["problems"] == 24 and row["tokens"] > 0 for row in report["rows"])
    assert (output / "accuracy_vs_tpf.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "report.md").is_file()
    summary = json.loads((output / "quickstart.json").read_text())
    assert summary["answer"]["usage"]["forwards"] >= 1 and summary["answer"]["text"]
    assert 0 < summary["peak_memory_gib"] < 6

    tuned = read_yaml(output / "settings.yaml")
    assert decoder(tuned.pop("decoder"), **tuned).name == "d3llm"
    assert read_trajectories(str(output / "trajectories")).num_rows == 64
    teacher, _ = load_model("tiny-llada")
    student, family = load_model(output / "student")
    assert family.name == "llada"
    changed = [
        name for (name, one), (_, other) in zip(teacher.named_parameters(), student.named_parameters(), strict=True)
        if not one.equal(other)
    ]  # fmt: skip
    assert changed and all(name.endswith("_proj.weight") for name in changed)
    answer = DiffusionLLM.from_pretrained(output / "student").generate([summary["answer"]["question"]])[0]
    assert answer.text

    complete = parse(QuickstartSettings, ["--config", str(output / "quickstart.yaml")])[0]
    stamps = {path: path.stat().st_mtime_ns for path in (output / "student").iterdir()}
    for name in ("ray.init", "d3llm_ray.decoding.api.load_model"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("a stage that is complete begins anew"))
    write_trajectories(complete.trajectory_settings(), QUIET)
    distill(complete.distill_settings(), QUIET)
    assert tune(complete.tune_settings(), QUIET).read_text() == (output / "settings.yaml").read_text()
    assert evaluate(complete.evaluate_settings(), QUIET).to_dict()["rows"] == report["rows"]  # measured once
    assert stamps == {path: path.stat().st_mtime_ns for path in (output / "student").iterdir()}
