"""Scoring rows together, and what a report looks like to the programs that read it."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from d3llm_ray.evaluation.plots import plot_report
from d3llm_ray.evaluation.report import score
from d3llm_ray.evaluation.rows import EvaluationRow

REQUIRED = {
    "model",
    "decoder",
    "task",
    "settings",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "tokens",
    "forwards",
    "tpf",
    "tps",
    "seconds",
    "aup",
}


def _row(model: str, decoder: str, tpf: float, accuracy: float, task: str = "arith", **settings) -> EvaluationRow:
    preset = "vanilla" if decoder.startswith("vanilla") else "d3llm"
    own = {"steps": None} if preset == "vanilla" else {"entropy_threshold": 0.45}
    return EvaluationRow(
        model=model,
        decoder=decoder,
        task=task,
        settings={"decoder": preset, **own, **settings},
        accuracy=accuracy,
        accuracy_low=max(0.0, accuracy - 3),
        accuracy_high=min(100.0, accuracy + 3),
        correct=round(accuracy * 5),
        problems=500,
        tokens=round(tpf * 1000),
        forwards=1000,
        tpf=tpf,
        tps=tpf * 100,
        seconds=1.0,
        max_tokens=64,
        temperature=0.0,
        seed=0,
        warmup=1,
        max_batch_size=32,
    )


def _scores(report) -> dict[tuple[str, str], float | None]:
    return {(row.model, row.decoder): row.aup for row in report.rows}


def test_a_method_is_scored_with_the_vanilla_point_of_its_own_model():
    # the published d3LLM-LLaDA figures on GSM8K: anchor (1, 74.02), best accuracy 74.98, AUP 637.6549
    rows = [
        _row("student", "vanilla", 1.0, 74.02),
        _row("student", "d3llm", 9.11, 73.09),
        _row("d2f", "vanilla", 1.0, 74.98),
    ]
    scores = _scores(score(rows))
    assert scores["student", "d3llm"] == pytest.approx(637.6549, abs=1e-3)
    assert scores["student", "vanilla"] == pytest.approx(74.02)
    assert scores["d2f", "vanilla"] == pytest.approx(74.98)


def test_the_anchor_keeps_its_measured_tpf():
    rows = [_row("m", "vanilla", 0.5, 80.0), _row("m", "d3llm", 2.5, 80.0)]
    assert _scores(score(rows))["m", "d3llm"] == pytest.approx(0.5 * 80 + 2.0 * 80)


def test_another_model_may_be_named_as_the_anchor():
    rows = [_row("teacher", "vanilla", 0.5, 80.0), _row("student", "d3llm", 4.5, 80.0)]
    assert _scores(score(rows))["student", "d3llm"] == pytest.approx(4.5 * 80)  # its own point alone
    # below the anchor's accuracy the difference shows: 0.5*80 + 4*(80 + 78 W(78))/2, W = exp(-3 * 2/80)
    rows = [_row("teacher", "vanilla", 0.5, 80.0), _row("student", "d3llm", 4.5, 78.0)]
    anchored = _scores(score(rows, {"student": "teacher"}))["student", "d3llm"]
    assert anchored == pytest.approx(40 + 2 * (80 + 78 * 0.927743), abs=1e-3)


def test_vanilla_with_fewer_steps_is_no_anchor():
    rows = [
        _row("m", "vanilla", 1.0, 80.0),
        _row("m", "vanilla fast", 4.0, 78.0, steps=16),
        _row("m", "d3llm", 3.0, 80.0),
    ]
    assert _scores(score(rows))["m", "d3llm"] == pytest.approx(80 + 2 * 80)


def test_all_settings_of_a_method_make_one_curve():
    rows = [
        _row("m", "vanilla", 1.0, 80.0),
        _row("m", "d3llm", 2.0, 80.0, entropy_threshold=0.2),
        _row("m", "d3llm", 3.0, 80.0, entropy_threshold=0.4),
        _row("m", "d3llm", 9.0, 40.0, entropy_threshold=2.0),  # too far below: does not count
    ]
    report = score(rows)
    assert [row.aup for row in report.rows[1:]] == pytest.approx([240.0] * 3)
    assert "d3llm, entropy_threshold=0.4 |" in report.to_markdown()


def test_the_best_accuracy_is_that_of_the_same_task():
    rows = [
        _row("m", "vanilla", 1.0, 50.0, "hard"),
        _row("m", "d3llm", 3.0, 50.0, "hard"),
        _row("m", "vanilla", 1.0, 100.0, "easy"),
    ]
    report = score(rows)
    assert report.rows[1].aup == pytest.approx(150.0)
    assert "| task |" in report.to_markdown()


def test_undefined_scores_are_null_and_valid_json(tmp_path):
    report = score([_row("m", "vanilla", 1.0, 0.0), _row("m", "d3llm", 3.0, 0.0)])
    assert _scores(report) == {("m", "vanilla"): None, ("m", "d3llm"): None}
    assert json.loads(report.to_json())["rows"][0]["aup"] is None
    assert score([_row("m", "d3llm", 0.0, 0.0), _row("n", "d3llm", 1.0, 10.0)]).rows[0].aup is None
    plot_report(report, tmp_path / "plot.png")  # nothing to shade is no error


def test_the_json_has_the_promised_fields_on_one_line(tmp_path):
    report = score([_row("m", "vanilla", 1.0, 80.0), _row("m", "d3llm", 3.0, 79.0)])
    report.write(tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert text.count("\n") == 1
    assert str(report).splitlines()[-1] == text.rstrip("\n")
    content = json.loads(text)
    assert content.keys() == {"rows", "anchors", "comparisons", "machine", "versions", "counting"}
    assert all(row.keys() >= REQUIRED and "samples" not in row for row in content["rows"])
    assert content["rows"][0].keys() == {field.name for field in fields(EvaluationRow)} - {"samples"}
    assert content["versions"]["torch"] and content["machine"]["cores"] >= 1
    assert content["counting"].keys() >= {"tokens", "forwards", "tpf", "tps", "accuracy", "aup"}
    table = (tmp_path / "report.md").read_text().splitlines()
    assert table[0] == "| model | decoder | accuracy | TPF | TPS | AUP |"
    assert table[2] == "| m | vanilla | 80.0 % (77.0 - 83.0) | 1.00 | 100.0 | 80.0 |"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_plot_is_a_png(tmp_path):
    rows = [
        _row("m", "vanilla", 1.0, 80.0),
        _row("m", "d3llm", 3.0, 79.0),
        _row("m", "d3llm", 5.0, 78.0),
        _row("m", "vanilla", 1.0, 70.0, "t2"),
    ]
    plot_report(score(rows), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
