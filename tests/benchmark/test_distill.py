"""Samples a second of a distillation: the loop against the jobs beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from d3llm_ray.benchmark import distill as benchmark
from d3llm_ray.benchmark.distill import DistillBenchmarkSettings, Run, bare_loop, of_metrics, ratios
from d3llm_ray.config import build
from d3llm_ray.distillation.local import distil_here
from d3llm_ray.distillation.plan import TrainingPlan
from d3llm_ray.distillation.training.metrics_file import METRICS_FILE, read_metrics
from d3llm_ray.errors import InputError
from d3llm_ray.models import read_configs
from d3llm_ray.progress import Progress
from tests.distillation.rows import write_rows


def runs_of(*named: tuple[str, float]) -> list[Run]:
    return [Run(name, 80, seconds, 2.5) for name, seconds in named]


def test_a_job_is_set_against_the_loops_beside_it() -> None:
    runs = runs_of(
        ("loop", 8.0), ("job of 1", 10.0), ("loop", 10.0), ("job of 2", 5.0), ("loop", 12.0),
        ("job of 1", 16.0), ("loop", 12.0), ("job of 2", 4.0), ("loop", 8.0),
    )  # fmt: skip
    found = {(ratio.name, ratio.what): (ratio.value, ratio.low, ratio.high) for ratio in ratios(runs)}
    assert found == {
        ("over_loop", "job of 1"): pytest.approx(((0.9 + 0.75) / 2, 0.75, 0.9)),
        ("over_loop", "job of 2"): pytest.approx(((2.2 + 2.5) / 2, 2.2, 2.5)),
        ("over_one", "job of 2"): pytest.approx((3.0, 2.0, 4.0)),
    }


def test_a_job_is_read_from_its_lines_behind_the_warm_up() -> None:
    lines = [
        {"step": 4, "loss": 2.5, "steps_per_second": 0.01},
        {"step": 8, "loss": 2.0, "steps_per_second": 2.0},  # 2 s
        {"step": 10, "loss": 1.5, "steps_per_second": 0.5},  # 4 s
    ]
    assert of_metrics("job of 1", lines, batch_size=32, warmup_steps=4) == Run("job of 1", 6 * 32, 6.0, 2.5)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, Any]:
    _, family = read_configs(tiny_checkpoint)
    folder = tmp_path_factory.mktemp("benchmark")
    rows = write_rows(folder, rows=40, canvas=32, vocab_size=4, mask_token_id=family.mask_token_id)
    sizes = {
        "objective": {"window_sizes": [8]},
        "batch_size": 8,
        "micro_batch_size": 4,
        "lora_rank": 4,
        "lora_alpha": 4,
    }
    return {"teacher": str(tiny_checkpoint), "trajectories": str(rows), "precision": "float32", **sizes}


def test_the_bare_loop_computes_what_the_run_computes(values: dict[str, Any], tmp_path: Path) -> None:
    settings = build(
        DistillBenchmarkSettings, {**values, "output": str(tmp_path / "out"), "max_steps": 4, "warmup_steps": 1}
    )
    alone = settings.of_job(settings.trajectories, str(tmp_path / "student"), workers=1)
    student = distil_here(alone, Progress(quiet=True))
    rows, _ = benchmark.load(alone, *benchmark.student_family(alone))
    found = bare_loop(TrainingPlan(alone, rows, benchmark.student_family(alone)[1]), warmup_steps=1)
    assert (found.name, found.samples) == ("loop", 3 * 8) and found.seconds > 0
    assert found.loss == pytest.approx(read_metrics(student / METRICS_FILE)[0]["loss"], rel=1e-5)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names in the order of their measurement; loops take 9 s for 72 samples, jobs 10 and 6 s."""
    order: list[str] = []

    def loop(plan: TrainingPlan, warmup_steps: int) -> tuple[int, Run]:
        order.append("loop")
        return 15, Run("loop", 72, 9.0, 2.5)

    def job(settings: Any, warmup_steps: int, progress: Progress) -> Run:
        order.append(f"job of {settings.workers}")
        return Run(order[-1], 72, {1: 10.0, 2: 6.0}[settings.workers], 2.50001)

    monkeypatch.setattr(benchmark, "_loop", loop)
    monkeypatch.setattr(benchmark, "_job", job)
    monkeypatch.setattr(benchmark.cluster, "connect", lambda **_: None)
    return order


def test_the_report_of_loop_and_jobs(values: dict[str, Any], measured: list[str], tmp_path: Path) -> None:
    settings = build(
        DistillBenchmarkSettings,
        {**values, "output": str(tmp_path / "out"), "max_steps": 10, "warmup_steps": 1, "rounds": 2},
    )
    text = str(benchmark.run(settings, Progress(quiet=True)))
    assert measured == ["loop", "job of 1", "loop", "job of 2"] * 2 + ["loop"]
    found = json.loads(text.splitlines()[-1])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "benchmark.yaml",
        "report.json",
        "report.md",
    ]
    rates = {row["name"]: row["per_second"] for row in found["rows"]}
    assert rates == pytest.approx({"loop": 8.0, "job of 1": 7.2, "job of 2": 12.0})
    assert [ratio["value"] for ratio in found["ratios"]] == pytest.approx([0.9, 1.5, 10 / 6])
    assert found["machine"]["nice"] == 15 and sum(len(row["seconds"]) for row in found["rows"]) == 9
    assert "| over_loop | job of 1 | 0.9 | 0.9 - 0.9 |" in text


def test_runs_that_do_not_compute_the_same_have_no_ratio(
    values: dict[str, Any], measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmark, "_job", lambda settings, *_: Run("job of 1", 72, 10.0, 2.6))
    settings = build(
        DistillBenchmarkSettings,
        {**values, "output": str(tmp_path / "out"), "max_steps": 10, "warmup_steps": 1, "workers": 1},
    )
    with pytest.raises(RuntimeError, match=r"first losses that differ: loop 2.5, job of 1 2.6, loop 2.5"):
        benchmark.run(settings, Progress(quiet=True))


def test_bad_input(values: dict[str, Any], measured: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="warmup_steps: got 20; accepted: a multiple of log_every"):
        build(DistillBenchmarkSettings, {**values, "log_every": 3})
    settings = build(
        DistillBenchmarkSettings, {**values, "output": str(tmp_path / "out"), "max_steps": 10, "warmup_steps": 10}
    )
    with pytest.raises(InputError, match="warmup_steps: got 10; accepted: fewer than the run's 10 steps"):
        benchmark.run(settings, Progress(quiet=True))
    assert measured == []
