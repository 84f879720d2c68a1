"""The verb `leaderboard`: settings are chosen on validation problems and the figures are those of the test problems."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from d3llm_ray.cli import main
from d3llm_ray.config import build
from d3llm_ray.decoding import read_decoder
from d3llm_ray.errors import IncompleteError, InputError
from d3llm_ray.evaluation.report import EvaluationReport
from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow, summarise
from d3llm_ray.evaluation.settings import EvaluateSettings
from d3llm_ray.leaderboard import run as verb
from d3llm_ray.leaderboard.settings import LeaderboardSettings
from tests.wiring import Notes

SYSTEMS = """
systems:
  plain: {model: tiny-llada, decoder: vanilla}
  quick: {model: tiny-llada, decoder: d3llm, grid: {entropy_threshold: [0.3, 0.6]}, note: ours}
  causal: {model: tiny-ar, decoder: autoregressive}
"""
# (split, preset, threshold) -> problems of a hundred that are right, tokens in four forwards: 0.6 is best on validation
# problems, and not on test problems.
FIGURES = {
    ("validation", "vanilla", None): (90, 2), ("test", "vanilla", None): (92, 2),
    ("validation", "d3llm", 0.3): (90, 8), ("test", "d3llm", 0.3): (92, 12),
    ("validation", "d3llm", 0.6): (88, 16), ("test", "d3llm", 0.6): (86, 10),
    ("validation", "autoregressive", None): (95, 4), ("test", "autoregressive", None): (97, 4),
}  # fmt: skip


def row_of(model: str, settings: dict[str, Any], task: str, split: str, error: str | None = None) -> EvaluationRow:
    right, tokens = FIGURES[split, settings["decoder"], settings.get("entropy_threshold")]
    samples = [
        EvaluatedSample(f"{split}-{each}", "", None, "1", each < right, tokens, 4, 5, "stop", error=None)
        for each in range(100)
    ]
    if error:
        samples[-1] = EvaluatedSample(f"{split}-99", "", None, "1", False, 0, 0, 5, "error", error=error)
    labels = {"model": model, "decoder": settings["decoder"], "task": task, "settings": settings}
    return summarise(samples, 4.0, **labels, max_tokens=64, temperature=0.0, seed=0, warmup=0, max_batch_size=4)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for `evaluate`: answers from the table; `calls`: the settings it was called with."""
    stand = SimpleNamespace(calls=[], error=None, errors=[])

    def evaluated(settings: EvaluateSettings, progress: Any, errors: str) -> EvaluationReport:
        stand.calls.append(settings)
        stand.errors.append(errors)
        rows = []
        for pair in settings.pairs:
            own = {"decoder": pair.decoder, **pair.decoder_settings}
            rows += [row_of(pair.model, own, task, settings.split, stand.error) for task in settings.tasks]
        return EvaluationReport(tuple(rows), {})

    monkeypatch.setattr(verb.evaluation, "run", evaluated)
    return stand


@pytest.fixture
def settings(tmp_path: Path) -> LeaderboardSettings:
    (tmp_path / "systems.yaml").write_text(SYSTEMS)
    values: dict[str, Any] = {"systems": tmp_path / "systems.yaml", "output": tmp_path / "board"}
    return build(LeaderboardSettings, {**values, "tasks": ["arith", "arith-long"], "published": []})


def test_chosen_on_validation_and_measured_on_test(settings: LeaderboardSettings, asked: SimpleNamespace) -> None:
    board = verb.run(settings, Notes())
    assert asked.errors == ["return"] * 3
    table = board.tables[0].table
    assert table.methods["quick"].points["arith"] == ((1.0, 92.0), (2.5, 86.0))  # 0.6, with its test figures
    assert table.methods["plain"].points["arith"] == ((1.0, 92.0),)
    assert table.methods["quick"].tps["arith"] == ((250.0, 86.0),)
    assert table.methods["quick"].note == "ours" and table.tasks == ["arith", "arith-long"]
    standings = json.loads((settings.output / "report.json").read_text())["standings"]
    assert {each["row"]["accuracy"] for each in standings if each["system"] == "quick"} == {86.0}
    for task in ("arith", "arith-long"):
        chosen = settings.output / "chosen" / f"quick-{task}.yaml"
        assert yaml.safe_load(chosen.read_text())["entropy_threshold"] == 0.6
        assert read_decoder(str(chosen)).name == "d3llm"  # a settings file for every verb
    text = (settings.output / "report.md").read_text()
    assert text.index("## arith\n") < text.index("## arith-long\n") < text.index("## Measured")


def test_every_setting_arrives(settings: LeaderboardSettings, asked: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    changed: dict[str, Any] = {
        "max_tokens": 48, "temperature": 0.5, "top_p": 0.9, "seed": 3, "max_batch_size": 5, "dtype": "bfloat16",
        "device": "cuda:1", "data_dir": tmp_path / "data", "actors": 3, "cpus_per_actor": 2, "gpus_per_actor": 0.5,
        "resource_timeout_s": 9.0, "warmup": 0, "shard_size": 7,
    }  # fmt: skip
    own: dict[str, Any] = {
        "systems": settings.systems, "tasks": ["arith-long"], "count": 21, "validation_count": 12,
        "published": ["dream"], "output": tmp_path / "other",
    }  # fmt: skip
    given = build(LeaderboardSettings, changed | own)
    defaults = {name: field.get_default() for name, field in LeaderboardSettings.model_fields.items()}
    assert [name for name, value in defaults.items() if getattr(given, name) == value] == []
    board = verb.run(given, Notes())
    validation, test = asked.calls
    for call in asked.calls:
        assert {name: getattr(call, name) for name in changed} == changed
        assert call.tasks == ["arith-long"]
    assert (validation.split, validation.count, test.split, test.count) == ("validation", 12, "test", 21)
    assert (validation.output, test.output) == (tmp_path / "other/validation", tmp_path / "other/test/arith-long")
    assert [len(call.pairs) for call in asked.calls] == [4, 3]  # the anchor of two systems once; the chosen of a grid
    assert [each.table.title for each in board.tables] == ["Measured", "The Dream family, as published"]
    assert (tmp_path / "other" / "leaderboard.yaml").is_file()


def test_problems_without_an_answer_are_named_after_the_report_is_written(
    settings: LeaderboardSettings, asked: SimpleNamespace
) -> None:
    asked.error = "too long"
    with pytest.raises(IncompleteError, match=r"answers are missing: .*too long"):
        verb.run(settings, Notes())
    assert (settings.output / "report.json").is_file()


REFUSED: list[tuple[Callable[[Path], dict[str, Any]], str]] = [
    (lambda folder: {"published": ["nothing"]}, "points: no file 'nothing'"),
    (lambda folder: {"systems": folder / "none.yaml"}, "systems: cannot read"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_bad_input_is_refused_before_anything_is_measured(
    change: Callable[[Path], dict[str, Any]], said: str, settings: LeaderboardSettings, asked: Any, tmp_path: Path
) -> None:
    given = build(LeaderboardSettings, settings.model_dump() | change(tmp_path))
    with pytest.raises(InputError, match=said):
        verb.run(given, Notes())
    assert not asked.calls and not settings.output.exists()


@pytest.mark.slow
def test_the_whole_verb_on_embedded_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A board of twelve problems; again, it measures nothing and says the same."""
    (tmp_path / "systems.yaml").write_text(SYSTEMS)
    words = ["leaderboard", "--systems", str(tmp_path / "systems.yaml"), "--tasks", "arith", "--count", "12"]
    words += ["--validation-count", "8", "--output", str(tmp_path / "board")]
    assert main(words) == 0
    first = capsys.readouterr().out
    report = json.loads(first.splitlines()[-1])
    assert next(table["title"] for table in report["tables"]) == "Measured" and len(report["tables"]) == 4
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "board").rglob("*.parquet")}
    assert len(kept) == 4 + 3
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == first.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    row = next(each["row"] for each in report["standings"] if each["system"] == "causal")
    assert row["problems"] == 12 and row["accuracy"] > 80
