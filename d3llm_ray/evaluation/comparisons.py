"""Two rows of the same problems compared problem by problem: McNemar's test and the interval of the difference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from d3llm_ray.errors import require
from d3llm_ray.evaluation.rows import Z95, EvaluationRow, wilson_interval


@dataclass(frozen=True)
class PairedComparison:
    """Rows `a` and `b` of a report (numbers from 0) on the same problems.

    `difference` is the accuracy of b minus that of a in points, with its 95 % interval; `p_value` is that of the exact
    two-sided McNemar test that neither is better.
    """

    a: int
    b: int
    both_right: int
    only_a: int
    only_b: int
    both_wrong: int
    difference: float
    difference_low: float
    difference_high: float
    p_value: float


def compare(rows: Sequence[EvaluationRow]) -> tuple[PairedComparison, ...]:
    """Every two rows of a task that have samples of the same problems, in the order of the rows."""
    return tuple(_comparisons(rows))


def _comparisons(rows: Sequence[EvaluationRow]) -> Iterator[PairedComparison]:
    ids = [[sample.problem_id for sample in row.samples] for row in rows]
    right = [[sample.correct for sample in row.samples] for row in rows]
    for a, b in combinations(range(len(rows)), 2):
        if rows[a].task != rows[b].task or not ids[a] or ids[a] != ids[b]:
            continue
        both, only_a, only_b, neither = paired_counts(right[a], right[b])
        low, high = paired_interval(both, only_a, only_b, neither)
        difference = (only_b - only_a) / len(ids[a])
        points = (100.0 * difference, 100.0 * low, 100.0 * high)
        yield PairedComparison(a, b, both, only_a, only_b, neither, *points, mcnemar(only_a, only_b))


def paired_counts(right_a: Iterable[bool], right_b: Iterable[bool]) -> tuple[int, int, int, int]:
    """Of the same problems, how many both answer rightly, a alone, b alone, and neither."""
    pairs = list(zip(right_a, right_b, strict=True))
    both, only_a, only_b, neither = (
        pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))
    )
    return both, only_a, only_b, neither


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p value: the binomial test of the problems that one of two answers alone (McNemar 1947)."""
    require(only_a >= 0 and only_b >= 0, "discordant problems", (only_a, only_b), "0 or more of each")
    discordant, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(discordant, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << discordant))


def paired_interval(both_right: int, only_a: int, only_b: int, both_wrong: int) -> tuple[float, float]:
    """The 95 % interval of share b minus share a, as fractions (Newcombe 1998, Statistics in Medicine 17, method 10).

    It is made of the two Wilson intervals and the correlation of the pairs, which is corrected for continuity.
    """
    count = both_right + only_a + only_b + both_wrong
    right_a, right_b = both_right + only_a, both_right + only_b
    share_a, share_b = right_a / count, right_b / count
    (low_a, high_a), (low_b, high_b) = wilson_interval(right_a, count), wilson_interval(right_b, count)
    margins = right_a * (count - right_a) * right_b * (count - right_b)
    determinant = float(both_right * both_wrong - only_a * only_b)
    if determinant > 0:
        determinant = max(determinant - count / 2, 0.0)
    correlation = determinant / math.sqrt(margins) if margins else 0.0

    def half(of_a: float, of_b: float) -> float:
        return math.sqrt(max(0.0, of_a**2 - 2 * correlation * of_a * of_b + of_b**2))

    difference = share_b - share_a
    below, above = half(high_a - share_a, share_b - low_b), half(share_a - low_a, high_b - share_b)
    return difference - below, difference + above


def problems_for(half_width: float) -> int:
    """Problems with which a 95 % interval is at most `half_width` points to each side, at the widest: at 50 %."""
    return math.ceil((Z95 * 50.0 / half_width) ** 2)
