"""Choosing settings, ranking, and intervals of AUP, each against figures made by hand or a literal reference."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from d3llm_ray.evaluation.aup import aup
from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow, summarise
from d3llm_ray.leaderboard.ranking import rank, to_markdown
from d3llm_ray.leaderboard.standings import MeasuredSystem, aup_intervals, choose


def row_of(right: Sequence[bool], tokens: int = 8, forwards: int = 4, name: str = "m") -> EvaluationRow:
    samples = [
        EvaluatedSample(f"p{number}", "", None, "1", each, tokens + number % 3, forwards, 5, "stop")
        for number, each in enumerate(right)
    ]
    labels = {
        "model": name,
        "decoder": "d3llm",
        "task": "t",
        "settings": {"decoder": "d3llm", "entropy_threshold": 0.5},
    }
    return summarise(samples, 2.0, **labels, max_tokens=64, temperature=0.0, seed=0, warmup=0, max_batch_size=4)


def share(count: int, right: int) -> list[bool]:
    return [number < right for number in range(count)]


def test_the_best_settings_are_those_of_the_best_aup() -> None:
    """Anchor 80 %. Faster at 78 % beats slower at 80 %; the fastest, at 70 %, is more than five points below."""
    anchor = row_of(share(100, 80), 4, 5)
    slow, fast, wild = (row_of(share(100, right), 4 * speed, 4) for right, speed in ((80, 2), (78, 3), (70, 9)))
    assert choose(anchor, [slow, fast, wild], 80.0) == 1
    assert choose(anchor, [wild, slow], 80.0) == 1
    assert choose(anchor, [fast, fast], 80.0) == 0  # the first of equals
    assert choose(anchor, [wild, fast], 0.0) == 0  # nothing right: nothing to choose by
    assert choose(anchor, [anchor], 80.0) == 0


def test_how_far_the_best_system_is_decides_too() -> None:
    """Areas of anchor 76 % and (2.9975, 72 %) or (2.865, 75 %). Best 76: W gives 76 and 61.5, 76 and 72.1, so 213.3 and
    214.1; best 100: 37.0 and 31.1, 37.0 and 35.4, so 144.0 and 143.5."""
    anchor = row_of(share(100, 76))
    low, high = row_of(share(100, 72), 11, 4), row_of(share(100, 75), 572, 200)
    assert (low.tpf, high.tpf) == (pytest.approx(2.9975), pytest.approx(2.865, abs=1e-4))
    assert choose(anchor, [low, high], 76.0) == 1 and choose(anchor, [low, high], 100.0) == 0


def test_the_anchor_stands_at_one_token_a_forward() -> None:
    """As published, whatever forwards its padding took; a system that is its own anchor has that point alone."""
    anchor, own = row_of(share(4, 3), 4, 16), row_of(share(4, 2), 12, 4)
    assert anchor.tpf < 1
    assert MeasuredSystem(anchor, own).points == ((1.0, 75.0), (own.tpf, 50.0))
    assert MeasuredSystem(anchor, anchor).points == ((1.0, 75.0),)


def test_intervals_against_a_literal_bootstrap() -> None:
    rng = random.Random(3)
    anchor, own, other = (
        row_of([rng.random() < each for _ in range(60)], tokens, 4)
        for each, tokens in ((0.8, 4), (0.75, 12), (0.5, 20))
    )
    systems = {
        "own": MeasuredSystem(anchor, own),
        "other": MeasuredSystem(anchor, other),
        "plain": MeasuredSystem(anchor, anchor),
    }
    intervals = aup_intervals(systems, resamples=200, seed=5)
    draws = np.random.default_rng(5).integers(60, size=(200, 60))
    scores: dict[str, list[float]] = {name: [] for name in systems}
    for draw in draws:

        def accuracy(row: EvaluationRow) -> float:
            return 100 * sum(row.samples[place].correct for place in draw) / 60  # noqa: B023

        best = max(accuracy(row) for row in (anchor, own, other))
        for name, row in (("own", own), ("other", other)):
            picked = [row.samples[place] for place in draw]
            tpf = sum(each.tokens for each in picked) / sum(each.forwards for each in picked)
            scores[name].append(aup([(1.0, accuracy(anchor)), (tpf, accuracy(row))], best))
        scores["plain"].append(accuracy(anchor))
    for name, values in scores.items():
        assert intervals[name] == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))
    assert intervals["own"][0] < aup(systems["own"].points, max(anchor.accuracy, own.accuracy)) < intervals["own"][1]


def test_where_nothing_is_right_nothing_is_scored() -> None:
    none = row_of(share(10, 0))
    assert aup_intervals({"a": MeasuredSystem(none, none)}) == {}
    (standing,) = rank("t", {"a": MeasuredSystem(none, none)})
    assert (standing.aup, standing.interval, standing.p_value) == (None, None, None)
    assert "| - |" in to_markdown([standing])


def test_the_ranking_says_what_it_cannot_tell_apart() -> None:
    anchor = row_of(share(400, 360), 4, 4, "teacher")
    leader = MeasuredSystem(anchor, row_of(share(400, 356), 16, 4, "first"))
    close = MeasuredSystem(anchor, row_of(share(400, 352), 16, 4, "second"))
    plain = MeasuredSystem(anchor, anchor)
    standings = rank("t", {"plain": plain, "close": close, "leader": leader})
    assert [each.system for each in standings] == ["leader", "close", "plain"]
    assert standings[0].aup == pytest.approx(aup(leader.points, 90.0)) and standings[0].p_value is None
    assert standings[1].p_value == pytest.approx(2 * 0.5**4)  # 4 problems alone right, none the other way round
    text = to_markdown(standings)
    assert "Intervals of AUP that reach into that of leader: close\n" in text and "Too few problems" not in text
    assert "| leader | `d3llm` entropy_threshold 0.5 | 89.0 % (85.6 - 91.7) |  | 4.25 |" in text
    few = to_markdown(rank("t", {"a": MeasuredSystem(row_of(share(20, 18)), row_of(share(20, 18)))}))
    assert "Too few problems" in few
