"""What a system's place is worth: its best settings by validation, and intervals of AUP over problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from d3llm_ray.evaluation.aup import Point, aup
from d3llm_ray.evaluation.rows import EvaluationRow

RESAMPLES = 1000
PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class MeasuredSystem:
    """Rows of one system on one task: that of its plain decoder, which anchors it, and its own; the same where the
    system is plain decoding."""

    anchor: EvaluationRow
    own: EvaluationRow

    @property
    def points(self) -> tuple[Point, ...]:
        """The anchor stands at one token a forward, as in the published tables: forwards for padding do not count."""
        return points_of(self.anchor.accuracy, self.own.tpf, self.own.accuracy, plain=self.own is self.anchor)


def points_of(anchor: float, tpf: float, accuracy: float, *, plain: bool) -> tuple[Point, ...]:
    return ((1.0, anchor),) if plain else ((1.0, anchor), (tpf, accuracy))


def best_accuracy(rows: Sequence[EvaluationRow]) -> float:
    return max(row.accuracy for row in rows)


def choose(anchor: EvaluationRow, candidates: Sequence[EvaluationRow], best: float) -> int:
    """Index of the candidate with the best AUP of anchor and candidate; the first of equal ones.

    `best`: the best accuracy of any system on these problems, in percent. Where it is 0, or a candidate has no tokens,
    AUP counts as 0.
    """
    scores = [
        aup(points_of(anchor.accuracy, row.tpf, row.accuracy, plain=row is anchor), best) if best and row.tpf else 0.0
        for row in candidates
    ]
    return scores.index(max(scores))


def aup_intervals(
    systems: Mapping[str, MeasuredSystem], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of every system's AUP on a task, by resampling its problems, the same for all systems.

    The rows must be of the same problems. The best accuracy is that of each resample, so that its uncertainty counts.
    Empty where no resample has a right answer.
    """
    rows = {id(row): row for measured in systems.values() for row in (measured.anchor, measured.own)}
    columns = {
        key: np.array([(sample.correct, sample.tokens, sample.forwards) for sample in row.samples], dtype=float)
        for key, row in rows.items()
    }
    count = len(next(iter(columns.values())))
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
    scores: dict[str, list[float]] = {name: [] for name in systems}
    for draw in draws:
        sums = {key: values[draw].sum(axis=0) for key, values in columns.items()}
        accuracy = {key: min(100.0 * right / count, 100.0) for key, (right, _, _) in sums.items()}
        if not (best := max(accuracy.values())):
            continue
        for name, measured in systems.items():
            _, tokens, forwards = sums[id(measured.own)]
            tpf = tokens / forwards if forwards else 0.0
            plain = measured.own is measured.anchor or not tpf
            points = points_of(accuracy[id(measured.anchor)], tpf, accuracy[id(measured.own)], plain=plain)
            scores[name].append(aup(points, best))
    intervals = {name: np.percentile(values, PERCENTILES) for name, values in scores.items() if values}
    return {name: (float(low), float(high)) for name, (low, high) in intervals.items()}
