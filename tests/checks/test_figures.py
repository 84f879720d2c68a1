"""What two decoders say about each other, against figures made by hand and literal references."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from d3llm_ray.checks.figures import Gain, against_first, single_aups, tpf_gain, tps_gain, verdict
from d3llm_ray.checks.report import same_answers
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.aup import aup
from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow, summarise


def row_of(
    counts: Sequence[tuple[int, int]], right: Sequence[bool] | None = None, seconds: float = 2.0
) -> EvaluationRow:
    samples = [
        EvaluatedSample(f"p{number}", "", None, "1", right is None or right[number], tokens, forwards, 5, "stop")
        for number, (tokens, forwards) in enumerate(counts)
    ]
    labels = {
        "model": "m",
        "decoder": "d",
        "task": "t",
        "settings": {},
        "max_tokens": 64,
        "temperature": 0.0,
        "seed": 0,
    }
    return summarise(samples, seconds, **labels, warmup=0, max_batch_size=4)


def test_more_tokens_a_forward_by_hand() -> None:
    """30 tokens in 20 forwards, 30 in 12: 1.5 and 2.5, two thirds more; where all problems are alike, surely so."""
    gain = tpf_gain(row_of([(15, 10), (15, 10)]), row_of([(15, 6), (15, 6)]))
    assert (gain.percent, gain.low, gain.high) == (pytest.approx(200 / 3),) * 3
    assert tpf_gain(row_of([(15, 10)] * 3), row_of([(15, 10)] * 3)) == Gain(0, 0, 0)
    with pytest.raises(InputError, match="problems: got 2"):
        tpf_gain(row_of([(1, 1)] * 3), row_of([(1, 1)] * 2))


def test_its_interval_against_a_literal_bootstrap() -> None:
    rng = random.Random(2)
    one = row_of([(rng.randint(10, 40), rng.randint(8, 20)) for _ in range(50)])
    two = row_of([(rng.randint(10, 40), rng.randint(5, 15)) for _ in range(50)])
    found = []
    for draw in np.random.default_rng(7).integers(50, size=(300, 50)):
        tpf = []
        for row in (one, two):
            picked = [row.samples[place] for place in draw]
            tpf.append(sum(each.tokens for each in picked) / sum(each.forwards for each in picked))
        found.append(100 * (tpf[1] / tpf[0] - 1))
    gain = tpf_gain(one, two, resamples=300, seed=7)
    assert (gain.low, gain.high) == pytest.approx(tuple(np.percentile(found, [2.5, 97.5])))
    assert gain.percent == pytest.approx(100 * (two.tpf / one.tpf - 1)) and gain.low < gain.percent < gain.high


def test_rounds_are_compared_each_within_itself() -> None:
    """A machine that is half as fast in one round is so for both: 20 %, 30 % and 50 % more."""
    first = [row_of([(60, 9)], seconds=each) for each in (1.0, 2.0, 4.0)]
    other = [row_of([(60, 9)], seconds=each) for each in (1 / 1.2, 2 / 1.5, 4 / 1.3)]
    gain = tps_gain(first, other)
    assert (gain.percent, gain.low, gain.high) == (pytest.approx(30), pytest.approx(20), pytest.approx(50))
    assert not gain.enough and not tps_gain(first[:1] * 5, other[:1] * 5).enough
    assert tps_gain(first * 2, other * 2).enough


def test_accuracy_is_compared_problem_by_problem() -> None:
    first = row_of([(1, 1)] * 20, [True] * 15 + [False] * 5)
    other = row_of([(1, 1)] * 20, [True] * 10 + [False] * 5 + [True] * 5)
    found = against_first([first], [other])
    assert (found.accuracy, found.p_value) == (0.0, 1.0)  # five lost, five won
    assert against_first([first], [row_of([(1, 1)] * 20, [True] * 10 + [False] * 10)]).p_value == 2 * 0.5**5


def test_single_settings_and_the_curve() -> None:
    first = row_of([(4, 8)] * 10, [True] * 9 + [False])
    fast = row_of([(16, 8)] * 10, [True] * 9 + [False])
    wild = row_of([(32, 8)] * 10, [True] * 5 + [False] * 5)
    singles, curve = single_aups(first, [fast, wild])
    assert singles == pytest.approx([180.0, 90.0])  # the anchor at 1; the last is far below, and adds nothing
    assert curve == pytest.approx(aup([(1, 90), (2, 90), (4, 50)], 90)) == pytest.approx(180)
    none = row_of([(4, 8)], [False])
    assert single_aups(none, [none]) == ([0.0], 0.0)


@pytest.mark.parametrize(
    ("gain", "published", "said"),
    [
        (Gain(33, 25, 41), 35, "+33 % (+25 to +41): a gain; the published +35 % is within it."),
        (Gain(9, 5, 13), 30, "+9 % (+5 to +13): a gain, less than the published +30 %."),
        (Gain(60, 50, 70), 30, "+60 % (+50 to +70): a gain, more than the published +30 %."),
        (Gain(2, -4, 8), 5, "+2 % (-4 to +8): no gain that could be told from none; the published +5 % is within it."),
        (Gain(-20, -30, -10), 35, "-20 % (-30 to -10): a loss, less than the published +35 %."),
        (Gain(9, 5, 13), None, "+9 % (+5 to +13): a gain."),
        (Gain(9, 5, 13, enough=False), 30, "+9 % (+5 to +13): too few rounds to tell; 6 are enough."),
    ],
)
def test_verdicts(gain: Gain, published: float | None, said: str) -> None:
    assert verdict(gain, published) == said


def test_other_answers_in_another_round_are_noticed() -> None:
    row = row_of([(4, 8), (5, 8)])
    assert same_answers([row, replace(row, seconds=9.0)])
    assert not same_answers([row, row_of([(4, 8), (5, 9)])]) and not same_answers([row, row_of([(4, 8), (6, 8)])])
    assert not same_answers([row, replace(row, samples=(row.samples[0], replace(row.samples[1], text="other")))])
