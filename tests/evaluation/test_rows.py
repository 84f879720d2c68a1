"""Counting: Wilson's interval by hand, and figures summed over samples."""

from __future__ import annotations

import pytest

from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.rows import EvaluatedSample, summarise, wilson_interval

LABELS = {
    "model": "m",
    "decoder": "d3llm",
    "task": "arith",
    "settings": {"decoder": "d3llm"},
    "max_tokens": 64,
    "temperature": 0.0,
    "seed": 0,
    "warmup": 1,
    "max_batch_size": 32,
}


def _sample(tokens: int, forwards: int, correct: bool) -> EvaluatedSample:
    return EvaluatedSample("id", "#### 4", "4", "4" if correct else "5", correct, tokens, forwards, 10, "stop")


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [
        (5, 10, 0.236593, 0.763407),  # textbook value
        (0, 10, 0.0, 0.277533),  # z^2/n / (1 + z^2/n)
        (10, 10, 0.722467, 1.0),
        (450, 500, 0.870578, 0.923322),
        (1, 1, 0.206549, 1.0),  # 1 / (1 + z^2)
    ],
)
def test_wilson_interval_by_hand(correct, count, low, high):
    assert wilson_interval(correct, count) == pytest.approx((low, high), abs=5e-6)


@pytest.mark.parametrize(("correct", "count"), [(0, 0), (2, 1), (-1, 3)])
def test_wilson_interval_refuses_impossible_counts(correct, count):
    with pytest.raises(InputError, match="correct"):
        wilson_interval(correct, count)


def test_tpf_is_the_ratio_of_sums_not_the_mean_of_ratios():
    row = summarise([_sample(60, 10, True), _sample(2, 20, False), _sample(10, 10, True)], seconds=4.0, **LABELS)
    assert (row.tokens, row.forwards, row.correct, row.problems) == (72, 40, 2, 3)
    assert row.tpf == pytest.approx(1.8)  # the mean of the ratios would be 2.37
    assert row.tps == pytest.approx(18.0)
    assert row.accuracy == pytest.approx(66.6667, abs=1e-4)
    assert row.accuracy_low < row.accuracy < row.accuracy_high
    assert len(row.samples) == 3


def test_a_run_without_problems_is_refused():
    with pytest.raises(InputError, match="problems"):
        summarise([], seconds=1.0, **LABELS)
