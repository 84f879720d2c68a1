"""Scored tables: who counts for the best accuracy, what is left out and said, what is written."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import pytest
import yaml
from PIL import Image

from d3llm_ray.cli import main
from d3llm_ray.config import build
from d3llm_ray.errors import InputError
from d3llm_ray.leaderboard.anyone import AupSettings, run
from d3llm_ray.leaderboard.board import score_table, score_tables
from d3llm_ray.leaderboard.points import PointsTable, open_points

MINE = """
title: Mine
methods:
  slow: {points: {t: [[1, 80]], u: [[1, 40]], v: [[1, 30]]}}
  fast: {points: {t: [[1, 80], [3, 78], [9, 60]], u: [[1, 40]], v: [[2, 30]]}, tps: {t: [[900, 78], [100, 80]]}}
  hidden: {points: {t: [[1, 100]]}, shown: false, note: not ours}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.yaml").write_text(MINE)
    return tmp_path / "mine.yaml"


def test_scores_by_hand(mine: Path) -> None:
    """The best accuracy is the hidden method's 100: W(80) = exp(-0.6), W(78) = exp(-0.66); 60 is left out."""
    scored = score_table(open_points(str(mine)))
    assert scored.best == {"t": 100.0, "u": 40.0, "v": 30.0}
    by_name = {each.name: each for each in scored.methods}
    area = 80 + 2 * (80 * math.exp(-0.6) + 78 * math.exp(-0.66)) / 2
    assert by_name["fast"].aup == pytest.approx({"t": area, "u": 40, "v": 60})
    assert by_name["fast"].left_out == {"t": ((9.0, 60.0),)}
    assert by_name["fast"].average == pytest.approx((area + 40 + 60) / 3)
    assert (by_name["slow"].average, by_name["hidden"].average) == (50.0, 100.0)  # each over its own tasks
    assert [each.name for each in scored.methods] == ["hidden", "fast", "slow"]
    text = scored.to_markdown()
    assert "- fast, t: 60 % at 9" in text and "| hidden | not ours | 100.00 | - | - | 100.00 |" in text


def test_best_of_methods_that_are_not_listed_and_a_divisor() -> None:
    methods = {"a": {"points": {"t": [[1, 50], [2, 50]]}}}
    table = build(PointsTable, {"methods": methods, "best": {"t": 100}, "divisor": 4})
    (method,) = score_table(table).methods
    assert method.aup["t"] == pytest.approx(50 + 50 * math.exp(-1.5)) and method.average == pytest.approx(
        method.aup["t"] / 4
    )


def test_where_nothing_is_right_there_is_no_score() -> None:
    methods = {"a": {"points": {"t": [[1, 0]]}}, "b": {"points": {"t": [[1, 0]], "u": [[1, 10]]}}}
    scored = score_table(build(PointsTable, {"methods": methods}))
    assert [(each.name, each.average, each.aup["t"]) for each in scored.methods] == [
        ("b", 10.0, None),
        ("a", None, None),
    ]
    assert "| a | - | - | - |" in scored.to_markdown()


def test_every_argument_of_the_scores_acts(mine: Path) -> None:
    assert list(inspect.signature(score_table).parameters) == ["points", "alpha", "offset"]
    assert list(inspect.signature(score_tables).parameters) == ["tables", "alpha", "offset"]
    plain = score_tables([open_points(str(mine))], alpha=0, offset=20)
    fast = plain.tables[0].methods[0]
    assert fast.aup["t"] == pytest.approx(80 + 2 * 79 + 6 * 69) and not fast.left_out
    assert (plain.alpha, plain.offset) == (0, 20)


def test_the_verb_writes_what_it_prints(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    assert main(["aup", f"{mine},dream", "--alpha", "2", "--offset", "4", "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())
    assert json.loads(printed.splitlines()[-1]) == report
    assert (folder / "report.md").read_text() in printed
    assert [table["title"] for table in report["tables"]] == ["Mine", "The Dream family, as published"]
    assert (report["alpha"], report["offset"]) == (2, 4)
    assert report["tables"][0]["methods"]["fast"]["left_out"] == {"t": [[9.0, 60.0]]}
    assert open_points(str(folder / "points" / "mine.yaml")) == open_points(str(mine))  # goes in again as it is
    assert yaml.safe_load((folder / "aup.yaml").read_text())["points"] == [str(mine), "dream"]
    pictures = {path.name for path in folder.glob("*.png")}
    kinds = ("bars", "curves", "radar", "speed")
    assert pictures == {f"{name}-{kind}.png" for name in ("mine", "the-dream-family-as-published") for kind in kinds}
    for name in pictures:
        with Image.open(folder / name) as image:
            assert image.width >= 600 and len(image.convert("L").getcolors(1 << 16) or ()) > 20, name


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("methods: {a: {points: {t: [[1, 0.5]]}}}")
    with pytest.raises(InputError, match="percent"):
        run(AupSettings(points=["dream", str(tmp_path / "bad.yaml")], output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
