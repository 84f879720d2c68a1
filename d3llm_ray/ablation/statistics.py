"""Means over a few seeds with their intervals, and comparisons paired by seed; pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from d3llm_ray.errors import require

# Student's t at 97.5 %, for 1 to 30 degrees of freedom (NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2).
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
MAX_SEEDS = len(T_975) + 1

Verdict = Literal["agrees", "disagrees", "gain", "loss", "not resolved"]


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds and its 95 % interval, which one seed does not give."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half_width(self) -> float | None:
        return None if self.high is None else self.high - self.mean


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean with Student's t interval, `mean +- t(n - 1) s / sqrt(n)`; None without a value."""
    count = len(values)
    require(count <= MAX_SEEDS, "seeds", count, f"at most {MAX_SEEDS}")
    if count == 0:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, None, count)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = T_975[count - 2] * deviation / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def gains(ours: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> list[float]:
    """By how many percent `ours` exceeds `theirs`, seed by seed; seeds that lack either figure are left out.

    So are figures of 0, over which nothing is a percentage more: students that wrote no token.
    """
    return [100.0 * (mine / other - 1.0) for mine, other in _pairs(ours, theirs) if other > 0]


def differences(ours: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> list[float]:
    """`ours - theirs`, seed by seed; seeds that lack either figure are left out."""
    return [mine - other for mine, other in _pairs(ours, theirs)]


def _pairs(ours: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> list[tuple[float, float]]:
    both = ((ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys()))
    return [(mine, other) for mine, other in both if mine is not None and other is not None]


def verdict(gain: Estimate | None, published: float | None) -> Verdict:
    """What the interval of a gain says of a published one: whether the sign is the same, not the size.

    Where nothing is published, only whether there is a gain or a loss. "not resolved" where 0 is inside.
    """
    if gain is None or gain.low is None or gain.high is None or gain.low <= 0 <= gain.high:
        return "not resolved"
    if published is None:
        return "gain" if gain.low > 0 else "loss"
    return "agrees" if gain.low > 0 else "disagrees"
