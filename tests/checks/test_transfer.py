"""The verb `check transfer`: both searches, what is measured of them, and the verdict, which an interval decides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from d3llm_ray.checks import transfer
from d3llm_ray.checks.transfer import TransferSettings
from d3llm_ray.checks.transfer_report import TransferReport
from d3llm_ray.cli import main
from d3llm_ray.config import build
from d3llm_ray.errors import IncompleteError, InputError
from d3llm_ray.evaluation.report import EvaluationReport
from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow, summarise
from d3llm_ray.evaluation.settings import EvaluateSettings
from d3llm_ray.tuning.settings import TuneSettings
from tests.wiring import Notes

ROOT = Path(__file__).parents[2]
FORWARDS = {"one token a forward": 20, "own settings": 10, "tuned on arith-long": 5, "tuned on arith": 8}


def row_of(label: str, forwards: int, wrong: int = 2, count: int = 40, **settings: Any) -> EvaluationRow:
    samples = [EvaluatedSample(str(n), "", None, "1", n >= wrong, 20, forwards, 5, "stop") for n in range(count)]
    given = {"model": "m", "decoder": label, "task": "arith-long"}
    own = {"decoder": "vanilla" if label.startswith("one token") else "d3llm", "entropy_threshold": 0.45, **settings}
    sizes = {"max_tokens": 64, "temperature": 0.0, "seed": 0, "warmup": 0, "max_batch_size": 4}
    return summarise(samples, 2.0, settings=own, **given, **sizes)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for `tune` and `evaluate`; `searches` and `measured`: what they were asked."""
    stand = SimpleNamespace(searches=[], measured=[], error=None)

    def tuned(settings: TuneSettings, _progress: Any, errors: str) -> Path:
        stand.searches.append(settings)
        return settings.output / "settings.yaml"

    def evaluated(settings: EvaluateSettings, _progress: Any, errors: str) -> EvaluationReport:
        stand.measured.append(settings)
        rows = [row_of(pair.decoder_label or "", FORWARDS.get(pair.decoder_label or "", 8)) for pair in settings.pairs]
        if stand.error:
            bad = replace(rows[1].samples[0], error=stand.error)
            rows[1] = replace(rows[1], samples=(bad, *rows[1].samples[1:]))
        return EvaluationReport(tuple(rows), {})

    monkeypatch.setattr(transfer.tuning, "run", tuned)
    monkeypatch.setattr(transfer.evaluation, "run", evaluated)
    return stand


def test_both_tasks_are_searched_and_four_decoders_measured_on_the_second(
    asked: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    shared: dict[str, Any] = {
        "max_tokens": 48, "temperature": 0.5, "top_p": 0.9, "seed": 3, "max_batch_size": 5, "dtype": "bfloat16",
        "device": "cuda:1", "data_dir": tmp_path / "data", "actors": 3, "cpus_per_actor": 2, "gpus_per_actor": 0.5,
        "resource_timeout_s": 9.0,
    }  # fmt: skip
    measuring = {"warmup": 0, "shard_size": 7, "count": 12}
    searching = {
        "model": "tiny-llada", "space": ROOT / "tune_spaces" / "entropy-threshold.yaml", "trials": 5, "metric": "aup",
    }  # fmt: skip
    own = {"source": "code", "task": "arith", "validation_count": 11, "output": tmp_path / "out"}
    asked_for = shared | measuring | searching | own
    settings = build(TransferSettings, asked_for)
    defaults = {name: field.get_default() for name, field in TransferSettings.model_fields.items()}
    assert [name for name, value in defaults.items() if getattr(settings, name) == value] == []
    transfer.run(settings, Notes())
    assert [search.task for search in asked.searches] == ["arith", "code"]
    for search, folder in zip(asked.searches, ("task", "source"), strict=True):
        assert {name: getattr(search, name) for name in shared | searching} == shared | searching
        assert (search.count, search.held_out, search.split) == (11, 0, "validation")
        assert search.output == tmp_path / "out" / "searches" / folder
    (measured,) = asked.measured
    assert {name: getattr(measured, name) for name in shared | measuring} == shared | measuring
    assert (measured.tasks, measured.split, measured.output) == (["arith"], "test", tmp_path / "out" / "measured")
    searches = tmp_path / "out" / "searches"
    assert [(pair.decoder, pair.decoder_label) for pair in measured.pairs] == [
        ("vanilla", "one token a forward"),
        ("d3llm", "own settings"),
        (str(searches / "task" / "settings.yaml"), "tuned on arith"),
        (str(searches / "source" / "settings.yaml"), "tuned on code"),
    ]
    assert {pair.model for pair in measured.pairs} == {"tiny-llada"}


def test_the_report_follows(asked: SimpleNamespace, tmp_path: Path) -> None:
    values = {"space": ROOT / "tune_spaces" / "tiny.yaml", "output": tmp_path / "out"}
    report = transfer.run(build(TransferSettings, values), Notes())
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert kept["verdict"] == report.verdict and [row["decoder"] for row in kept["rows"]] == list(FORWARDS)
    text = (tmp_path / "out" / "report.md").read_text()
    # 95 % right: AUP of the anchor (1, 95) and a point (4, 95) is 95 + 3 x 95
    assert "| 4.00 | 400 | 380.0 |" in text and "| 1.00 | 400 | 95.0 |" in text and report.verdict in text
    with Image.open(tmp_path / "out" / "transfer.png") as image:
        assert image.width > 500
    asked.error = "too long"
    with pytest.raises(IncompleteError, match="too long"):
        transfer.run(build(TransferSettings, {**values, "output": tmp_path / "error"}), Notes())
    assert (tmp_path / "error" / "report.json").is_file()


def verdict_of(of_task: EvaluationRow, of_source: EvaluationRow, wrong: int = 2) -> str:
    anchor = row_of("one token a forward", 20, wrong)
    rows = (anchor, row_of("own", 10), of_task, of_source)
    return TransferReport("arith", "arith-long", "smooth-aup", 0, rows).verdict


def test_the_verdict_is_what_the_interval_of_the_difference_says() -> None:
    slow, fast = row_of("a", 8, entropy_threshold=0.3), row_of("b", 5, entropy_threshold=0.6)
    assert "tuned on arith are worse on arith-long" in verdict_of(fast, slow)
    assert "worth its own search" in verdict_of(fast, slow)
    assert "tuned on arith are better on arith-long" in verdict_of(slow, fast)
    # one answer more is wrong of forty: as likely as not to be drawn
    near = row_of("c", 8, 3, entropy_threshold=0.4)
    assert "could not be told on arith-long" in verdict_of(near, slow)
    assert "could not be told on arith-long" in verdict_of(slow, near)
    assert "chose the same settings" in verdict_of(slow, replace(slow, decoder="b"))
    assert "Nothing is right at one token a forward" in verdict_of(slow, fast, wrong=40)


def test_the_settings_that_a_search_changed_are_shown() -> None:
    of_task, of_source = row_of("t", 5, entropy_threshold=0.625), row_of("s", 8)
    report = TransferReport(
        "a", "b", "aup", 0, (row_of("one token a forward", 20), row_of("own", 10), of_task, of_source)
    )
    lines = report.to_markdown().splitlines()
    assert next(line for line in lines if line.startswith("| t ")).split("|")[2].strip() == "entropy_threshold 0.625"
    assert all(line.split("|")[2].strip() == "" for line in lines if line.startswith(("| s ", "| own ", "| one ")))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"source": "arith", "task": "arith"}, "source: got 'arith'; accepted: another task"),
        ({"task": "no-task"}, "no-task"),
        ({"source": "no-task"}, "no-task"),
        ({"model": "no-model"}, "no-model"),
        ({"model": "tiny-ar"}, "d3llm"),
        ({"space": ROOT / "tune_spaces" / "none.yaml"}, "none.yaml"),
    ],
)
def test_bad_input_is_refused_before_any_search(
    asked: SimpleNamespace, values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    given = {"space": ROOT / "tune_spaces" / "tiny.yaml", "output": tmp_path / "out", **values}
    with pytest.raises((InputError, OSError), match=said):
        transfer.run(build(TransferSettings, given), Notes())
    assert asked.searches == [] and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_whole_transfer(ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = str(ROOT / "tune_spaces" / "tiny.yaml")
    sizes = ["--trials", "2", "--validation-count", "8", "--count", "8"]
    assert main(["check", "transfer", "--space", space, *sizes, "--output", str(tmp_path / "out")]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["decoder"] for row in report["rows"]] == list(FORWARDS)
    for folder, row in zip(("task", "source"), report["rows"][2:], strict=True):
        settings = (tmp_path / "out" / "searches" / folder / "settings.yaml").read_text()
        assert f"entropy_threshold: {row['settings']['entropy_threshold']}" in settings
