"""The report of two rows and two seeds, worked by hand."""

from __future__ import annotations

import json
import math

import pytest

from d3llm_ray.ablation.plan import make_design
from d3llm_ray.ablation.plots import plot_gains, plot_points
from d3llm_ray.ablation.report import AblationReport, make_report
from d3llm_ray.ablation.trial import Record
from d3llm_ray.evaluation.rows import EvaluationRow

# TPF and accuracy at thresholds 0.15 and 0.45, by row and seed
STUDENTS = {
    ("recipe", 0): ((2.0, 90.0), (3.0, 90.0)),
    ("recipe", 1): ((2.0, 90.0), (4.0, 80.0)),
    ("order-random", 0): ((1.0, 90.0), (2.0, 88.0)),
    ("order-random", 1): ((1.0, 90.0), (2.5, 82.0)),
    ("targets-reference", 0): ((1.0, 90.0), (1.0, 90.0)),
}


def _row(key: str, tpf: float, accuracy: float, **settings) -> EvaluationRow:
    return EvaluationRow(
        model=key,
        decoder=settings["decoder"],
        task="arith",
        settings=settings,
        accuracy=accuracy,
        accuracy_low=accuracy,
        accuracy_high=accuracy,
        correct=round(accuracy),
        problems=100,
        tokens=1000,
        forwards=round(1000 / tpf),
        tpf=tpf,
        tps=100.0,
        seconds=10.0,
        max_tokens=64,
        temperature=0.0,
        seed=0,
        warmup=1,
        max_batch_size=32,
    )


def _record(variant: str, seed: int, points) -> Record:
    rows = (
        _row(f"{variant}-seed{seed}", *point, decoder="d3llm-nocache", entropy_threshold=threshold)
        for point, threshold in zip(points, (0.15, 0.45), strict=True)
    )
    return Record(variant, seed, {"distill": 1.0, "evaluate": 1.0}, tuple(rows))


def _teacher() -> Record:
    vanilla = _row("teacher-0", 0.5, 90.0, decoder="vanilla", steps=None)
    swept = (
        _row("teacher-0", 1.5, 90.0, decoder="d3llm-nocache", entropy_threshold=threshold) for threshold in (0.15, 0.45)
    )
    return Record("teacher", 0, {"distill": 0.0, "evaluate": 1.0}, (vanilla, *swept))


@pytest.fixture
def report(make_settings) -> AblationReport:
    records = [_record(*key, points) for key, points in STUDENTS.items()]
    design = make_design(make_settings(variants=["order-random", "targets-reference"]))
    return make_report(design, 120, [_teacher(), *records], {"targets-reference-seed1": "RuntimeError: broke"})


def test_figures_and_gains_by_hand(report):
    recipe, random, targets = report.lines
    assert (recipe.name, recipe.against, recipe.tpf.gain, recipe.verdict) == ("recipe", None, None, None)
    assert recipe.tpf.estimate.mean == 3.5 and recipe.accuracy.estimate.mean == 85.0
    # gains of 3/2 and 4/2.5: 50 % and 60 %, s = 5 sqrt 2, half = 12.706 * 5
    assert random.tpf.gain.mean == pytest.approx(55.0)
    assert (random.tpf.gain.low, random.tpf.gain.high) == (pytest.approx(55 - 63.53), pytest.approx(55 + 63.53))
    assert (random.published_gain, random.verdict) == (18.0, "not resolved")
    assert random.accuracy.gain.mean == pytest.approx(0.0)  # 90 - 88 and 80 - 82
    assert random.points == ((1.0, 90.0), (2.25, 85.0))
    # against order-random, and on its only seed
    assert (targets.against, targets.tpf.gain.mean, targets.tpf.gain.low) == (
        "order-random",
        pytest.approx(100.0),
        None,
    )
    assert targets.tpf.estimate.count == 1


def test_aup_starts_from_the_teachers_vanilla_run_and_the_best_accuracy_of_all(report):
    # recipe, seed 0: .5 * 90 + (3 - .5) * 90; seed 1: the point at 80 is more than five points below and falls out
    assert report.lines[0].aup.estimate.mean == pytest.approx((45 + 2.5 * 90 + 45 + 1.5 * 90) / 2)
    weighted = 88 * math.exp(-3 * (1 - 88 / 90))
    random = [45 + 0.5 * 90 + 1.0 * (90 + weighted) / 2, 45 + 0.5 * 90]
    assert report.lines[1].aup.estimate.mean == pytest.approx(sum(random) / 2)
    assert report.lines[1].aup.gain.mean == pytest.approx(100 * ((270 / random[0] + 180 / random[1]) / 2 - 1))


def test_without_the_teacher_there_is_no_aup(make_settings):
    design = make_design(make_settings(variants=["order-random"]))
    records = [_record(*key, points) for key, points in STUDENTS.items() if key[0] != "targets-reference"]
    report = make_report(design, 1, records, {"teacher-0": "RuntimeError: broke"})
    assert report.lines[0].aup.estimate is None and report.lines[1].aup.gain is None
    assert report.lines[1].tpf.gain.mean == pytest.approx(55.0)


def test_the_table_and_the_json(report, tmp_path):
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| order | order-random | not resolved | +55.0 (-8.5 to +118.5) | +18 | +0.0" in text
    assert "| targets | targets-reference (against order-random) | not resolved | +100.0 | - |" in text
    assert "| recipe | recipe | - | - | - | - | - | 85.0 ± 63.5 | 3.50 ± 6.35 |" in text
    assert "| teacher | vanilla | - | - | - | - | - | 90.0 | 0.50 |" in text
    assert "120 optimizer steps" in text and "- targets-reference-seed1: RuntimeError: broke" in text
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["lines"][1]["tpf"]["gain"]["mean"] == pytest.approx(55.0)
    assert content["failures"] and len(content["rows"]) == 10 and content["counting"]["verdict"]


def test_the_plots_are_drawn_of_incomplete_rows_too(report, tmp_path):
    plot_gains(report, tmp_path / "gains.png")
    plot_points(report, tmp_path / "points.png")
    for name in ("gains.png", "points.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
