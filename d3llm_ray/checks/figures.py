"""What two decoders' rows on the same problems say about each other, and whether a published gain is among it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from d3llm_ray.errors import require
from d3llm_ray.evaluation.aup import Point, aup
from d3llm_ray.evaluation.comparisons import compare
from d3llm_ray.evaluation.rows import EvaluationRow

RESAMPLES = 2000
# Of two equal decoders one is the faster in n rounds of n with a chance of 2 / 2**n: 3 % with six.
FEWEST_ROUNDS = 6
PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Gain:
    """How much more, in percent, with what it lies within: 95 % over problems, or the extremes of the rounds.

    `enough`: whether there is enough to say that it is one.
    """

    percent: float
    low: float
    high: float
    enough: bool = True

    def __str__(self) -> str:
        return f"{self.percent:+.0f} % ({self.low:+.0f} to {self.high:+.0f})"


@dataclass(frozen=True)
class AgainstFirst:
    """A variant against the check's first one, on the same problems. Accuracy in points, with Newcombe's 95 % interval
    and McNemar's exact p."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    p_value: float
    tpf: Gain
    tps: Gain

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def tpf_gain(first: EvaluationRow, other: EvaluationRow, resamples: int = RESAMPLES, seed: int = 0) -> Gain:
    """Tokens per forward of `other` over those of `first`, with the percentile bootstrap over their common problems."""

    def counts(row: EvaluationRow) -> Any:
        return np.array([(sample.tokens, sample.forwards) for sample in row.samples], dtype=float)

    def more(of_first: Any, of_other: Any) -> Any:
        """Of sums [..., (tokens, forwards)]."""
        return 100 * (of_other[..., 0] / of_other[..., 1] / (of_first[..., 0] / of_first[..., 1]) - 1)

    one, two = counts(first), counts(other)
    require(len(one) == len(two), "problems", len(two), f"{len(one)}, those of the first")
    draws = np.random.default_rng(seed).integers(len(one), size=(resamples, len(one)))
    low, high = np.percentile(more(one[draws].sum(1), two[draws].sum(1)), PERCENTILES)
    return Gain(float(more(one.sum(0), two.sum(0))), float(low), float(high))


def tps_gain(first: Sequence[EvaluationRow], other: Sequence[EvaluationRow]) -> Gain:
    """Tokens a second of `other` over those of `first`: the median of the rounds' own ratios, and their extremes."""
    gains = [100 * (after.tps / before.tps - 1) for before, after in zip(first, other, strict=True)]
    return Gain(float(np.median(gains)), min(gains), max(gains), len(gains) >= FEWEST_ROUNDS)


def against_first(first: Sequence[EvaluationRow], other: Sequence[EvaluationRow]) -> AgainstFirst:
    """`first` and `other`: a row a round, of which tokens and answers are the same."""
    (paired,) = compare([first[0], other[0]])
    points = (paired.difference, paired.difference_low, paired.difference_high, paired.p_value)
    return AgainstFirst(*points, tpf_gain(first[0], other[0]), tps_gain(first, other))


def single_aups(first: EvaluationRow, others: Sequence[EvaluationRow]) -> tuple[list[float], float]:
    """AUP of each of `others` with the anchor, the accuracy of `first` at one token a forward, and of the whole curve.

    0 where nothing is right or a row has no tokens.
    """
    anchor: Point = (1.0, first.accuracy)
    best = max(row.accuracy for row in (first, *others))
    if not best or not all(row.tpf for row in others):
        return [0.0] * len(others), 0.0
    points = [(row.tpf, row.accuracy) for row in others]
    return [aup([anchor, point], best) for point in points], aup([anchor, *points], best)


def verdict(gain: Gain, published: float | None) -> str:
    """One sentence: is there a gain at all, and is the published one within what was measured?"""
    if not gain.enough:
        return f"{gain}: too few rounds to tell; {FEWEST_ROUNDS} are enough."
    if gain.low <= 0 <= gain.high:
        sure = "no gain that could be told from none"
    else:
        sure = "a gain" if gain.low > 0 else "a loss"
    if published is None:
        return f"{gain}: {sure}."
    if gain.low <= published <= gain.high:
        return f"{gain}: {sure}; the published {published:+g} % is within it."
    side = "less" if gain.high < published else "more"
    return f"{gain}: {sure}, {side} than the published {published:+g} %."
