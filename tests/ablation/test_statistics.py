"""Intervals and paired comparisons against figures worked out elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest

from d3llm_ray.ablation.statistics import MAX_SEEDS, T_975, Estimate, differences, estimate, gains, verdict
from d3llm_ray.errors import InputError


def test_the_quantiles_leave_a_fortieth_above_them():
    for freedom, quantile in enumerate(T_975, start=1):
        # Student's density, integrated from 0 by Simpson's rule.
        x = np.linspace(0.0, quantile, 20_001)
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        area = (density[0] + density[-1] + 4 * density[1:-1:2].sum() + 2 * density[2:-1:2].sum()) * (x[1] - x[0]) / 3
        assert 0.5 + area == pytest.approx(0.975, abs=3.5e-5), freedom  # a wrong third decimal is 5e-5


def test_two_and_three_values_by_hand():
    two = estimate([1.0, 3.0])
    assert two is not None and two.mean == 2.0
    assert two.half_width == pytest.approx(12.706)  # s = sqrt 2, over sqrt 2
    three = estimate([1.0, 2.0, 6.0])
    assert three is not None and three.mean == 3.0
    assert (three.low, three.high) == (pytest.approx(3 - 6.573, abs=1e-3), pytest.approx(3 + 6.573, abs=1e-3))


def test_students_own_sleep_data():
    # Student, "The probable error of a mean" (1908), table of additional hours of sleep, as R's t.test gives it
    differences = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    estimated = estimate(differences)
    assert estimated is not None and estimated.mean == pytest.approx(1.58)
    assert (estimated.low, estimated.high) == (pytest.approx(0.7001, abs=2e-4), pytest.approx(2.4599, abs=2e-4))


def test_too_few_and_too_many_values():
    assert estimate([]) is None
    assert estimate([4.0]) == Estimate(4.0, None, None, 1) and Estimate(4.0, None, None, 1).half_width is None
    with pytest.raises(InputError, match=f"seeds: got {MAX_SEEDS + 1}"):
        estimate([0.0] * (MAX_SEEDS + 1))


def test_comparisons_are_paired_by_seed():
    ours, theirs = {0: 3.0, 1: 4.0, 2: 9.0, 4: 1.0}, {1: 5.0, 0: 2.0, 3: 7.0, 4: None}
    assert gains(ours, theirs) == pytest.approx([50.0, -20.0])
    assert differences(ours, theirs) == [1.0, -1.0]
    assert gains({0: 3.0, 1: 0.0}, {0: 0.0, 1: 2.0}) == [-100.0]  # nothing is a percentage more than 0
    assert differences({0: 3.0}, {0: 0.0}) == [3.0]


@pytest.mark.parametrize(
    ("low", "high", "published", "expected"),
    [
        (0.1, 9.0, 18.0, "agrees"),
        (-9.0, -0.1, 18.0, "disagrees"),
        (-0.1, 30.0, 18.0, "not resolved"),
        (0.0, 30.0, 18.0, "not resolved"),
        (0.1, 9.0, None, "gain"),
        (-9.0, -0.1, None, "loss"),
        (-1.0, 1.0, None, "not resolved"),
        (None, None, 18.0, "not resolved"),
    ],
)
def test_verdicts(low, high, published, expected):
    assert verdict(Estimate(1.0, low, high, 3), published) == expected


def test_no_comparison_resolves_nothing():
    assert verdict(None, 18.0) == "not resolved"
