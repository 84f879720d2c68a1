"""Accuracy Under Parallelism, the area that scores accuracy and parallelism together (d3LLM, arXiv:2601.07568)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from operator import itemgetter

from d3llm_ray.errors import require

Point = tuple[float, float]

ALPHA = 3.0
OFFSET = 5.0


def aup(points: Iterable[Point], max_accuracy: float, alpha: float = ALPHA, offset: float = OFFSET) -> float:
    """Score the measured `(tokens per forward, accuracy in percent)` pairs of one method on one task.

    With the pairs sorted by tokens per forward rho, pairs whose accuracy y is below `y_1 - offset` are left out, and

        AUP = rho_1 y_1 + sum over i >= 2 of (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2
        W(y) = min(exp(-alpha (1 - y / max_accuracy)), 1)

    The first term carries no weight, so a single pair scores rho * y. Pairs of equal rho keep the order they are given
    in, as published. The published program also stops with an assertion when the last pair is among those left out;
    here leaving it out is all that happens, so a setting that costs more than `offset` points of accuracy gains
    nothing, but does not hide the others.

    Args:
        points: the pairs; their order matters only among pairs of equal rho. Accuracy within 0 to 100.
        max_accuracy: the best accuracy of any method on the task, in percent.
        alpha: how fast accuracy below the best is discounted.
        offset: the loss of accuracy, in points, beyond which a pair does not count.

    Raises:
        InputError: no pairs, a tokens-per-forward that is not above 0, or an accuracy outside 0 to 100.
    """
    kept = counted_points(points, offset)
    require(
        math.isfinite(max_accuracy) and 0 < max_accuracy <= 100, "max_accuracy", max_accuracy, "above 0, at most 100"
    )
    require(math.isfinite(alpha) and alpha >= 0, "alpha", alpha, "a number of at least 0")
    area = kept[0][0] * kept[0][1]
    for (left, left_accuracy), (right, right_accuracy) in pairwise(kept):
        heights = weighted(left_accuracy, max_accuracy, alpha) + weighted(right_accuracy, max_accuracy, alpha)
        area += (right - left) * heights / 2
    return area


def weighted(accuracy: float, max_accuracy: float, alpha: float = ALPHA) -> float:
    """`y W(y)`: the accuracy, in percent, discounted by its distance from the best one."""
    return accuracy * min(math.exp(-alpha * (1 - accuracy / max_accuracy)), 1.0)


def counted_points(points: Iterable[Point], offset: float = OFFSET) -> list[Point]:
    """Check the pairs, sort them by tokens per forward, leave out those over `offset` points below the first."""
    ordered = sorted(((float(tpf), float(accuracy)) for tpf, accuracy in points), key=itemgetter(0))
    require(bool(ordered), "points", ordered, "at least one (tokens per forward, accuracy in percent) pair")
    require(math.isfinite(offset) and offset >= 0, "offset", offset, "a number of at least 0")
    for tpf, accuracy in ordered:
        require(math.isfinite(tpf) and tpf > 0, "points", tpf, "tokens per forward above 0")
        require(0 <= accuracy <= 100, "points", accuracy, "accuracy in percent, 0 to 100")
    floor = ordered[0][1] - offset
    return [(tpf, accuracy) for tpf, accuracy in ordered if accuracy >= floor]


def area_curve(points: Iterable[Point], max_accuracy: float) -> tuple[list[float], list[float]]:
    """Tokens per forward and heights of the curve under which AUP is the area: what a plot of it draws.

    The first term carries no weight, so from 0 to the first pair the height is the plain accuracy.
    """
    kept = counted_points(points)
    first, accuracy = kept[0]
    heights = [accuracy, accuracy, *(weighted(each, max_accuracy) for _, each in kept)]
    return [0.0, first, *(tpf for tpf, _ in kept)], heights


def leaderboard(scores: Mapping[str, Mapping[str, float]], divisor: float | None = None) -> dict[str, float]:
    """Average each method's AUP over the tasks it was measured on, best first.

    Args:
        scores: method -> task -> AUP.
        divisor: divide the sum by this instead of by the number of tasks; 5 reproduces the published averages,
            which divide by 5 however many tasks there are.

    Raises:
        InputError: a method without a task, or a divisor that is not above 0.
    """
    require(divisor is None or divisor > 0, "divisor", divisor, "a number above 0")
    for method, tasks in scores.items():
        require(bool(tasks), f"scores.{method}", {}, "at least one task")
    averages = {method: sum(tasks.values()) / (divisor or len(tasks)) for method, tasks in scores.items()}
    return dict(sorted(averages.items(), key=lambda item: -item[1]))
