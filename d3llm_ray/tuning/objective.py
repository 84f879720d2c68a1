"""What a search maximises: one score for a trial's accuracy and speed, or both at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from d3llm_ray.errors import require
from d3llm_ray.evaluation.aup import ALPHA, OFFSET, Point, aup, weighted

Metric = Literal["aup", "smooth-aup", "tpf", "tps", "accuracy-tpf", "accuracy-tps"]


def smooth_aup(anchor: Point, point: Point, alpha: float = ALPHA, offset: float = OFFSET) -> float:
    """AUP of `anchor` and one other point, without the cliff at `offset` points of accuracy below the anchor.

    With the anchor (rho_0, y_0), a point (rho, y) with rho >= rho_0, and W as in AUP with y_0 as the best accuracy:

        rho_0 y_0 + (rho - rho_0) (y_0 + y W(y)) / 2 * exp(-alpha max(0, y_0 - offset - y) / offset)

    The last factor is AUP's own weight on the scale of the offset: what is lost beyond the offset is discounted by it,
    where AUP leaves the point out. The score is continuous and rises with TPF and with accuracy; it is AUP where
    y >= y_0 - offset. A point slower than the anchor scores rho y_0, whatever its accuracy.
    """
    (slow, best), (tpf, accuracy) = anchor, point
    if tpf <= slow:
        return tpf * best
    kept = math.exp(-alpha * max(0.0, best - offset - accuracy) / offset)
    return slow * best + (tpf - slow) * (best + weighted(accuracy, best, alpha)) / 2 * kept


@dataclass(frozen=True)
class SearchObjective:
    """Scores (TPF, accuracy, TPS) against the anchor, the point of the model or of its teacher decoded by `vanilla`.

    `aup`: the AUP of anchor and trial, the anchor's accuracy being the best one; settings that cost more than 5
    points score what the anchor alone does. `smooth-aup`: the same without that cliff, see there. `tpf` and `tps`: that
    figure, where accuracy is at most `max_accuracy_drop` points below the anchor's; elsewhere minus the missing points,
    which leads the search back. `accuracy-tpf` and `accuracy-tps` search the front of both; their score, which only
    chooses one point of the front, is that of `tpf` and `tps`.

    Raises:
        InputError: an AUP with an anchor that has no correct answer or no token; it would rank nothing.
    """

    metric: Metric
    anchor: Point
    max_accuracy_drop: float

    def __post_init__(self) -> None:
        tpf, accuracy = self.anchor
        require(0 <= accuracy <= 100 and tpf >= 0, "anchor", self.anchor, "(TPF of 0 or more, accuracy in percent)")
        if self.metric in ("aup", "smooth-aup"):
            accepted = "tpf or tps, for a model whose vanilla decoding solves no problem of the task"
            require(self.ranks, "metric", self.metric, accepted)

    @property
    def ranks(self) -> bool:
        """Whether AUP is defined with this anchor."""
        return min(self.anchor) > 0

    @property
    def speed(self) -> Literal["tpf", "tps"]:
        """The figure of speed that counts."""
        return "tps" if self.metric.endswith("tps") else "tpf"

    @property
    def goals(self) -> tuple[str, ...]:
        """The figures that the search maximises, by their names in a trial's report."""
        return ("accuracy", self.speed) if self.metric.startswith("accuracy-") else ("score",)

    def aup(self, tpf: float, accuracy: float) -> float:
        """AUP of anchor and point; 0 where it is not defined: without a token, or with an anchor that ranks nothing."""
        return aup([self.anchor, (tpf, accuracy)], self.anchor[1]) if tpf > 0 and self.ranks else 0.0

    def score(self, tpf: float, accuracy: float, tps: float) -> float:
        """The score of one trial; higher is better."""
        if self.metric == "aup":
            return self.aup(tpf, accuracy)
        if self.metric == "smooth-aup":
            return smooth_aup(self.anchor, (tpf, accuracy))
        missing = self.anchor[1] - self.max_accuracy_drop - accuracy
        return -missing if missing > 0 else {"tpf": tpf, "tps": tps}[self.speed]


@dataclass(frozen=True)
class TuneTrial:
    """One measured setting; `number` counts trials in the order in which they finished.

    `errors` of the problems have no answer and count as wrong; `unanswered` names them with their reasons. A trial that
    a race has `stopped` has seen `problems` of the search's only: accuracy, TPF and scores are what they let expect of
    all (see `racing`), and it is never chosen.
    """

    number: int
    values: dict[str, Any]
    score: float
    accuracy: float
    tpf: float
    tps: float
    tokens: int
    forwards: int
    seconds: float
    errors: int = 0
    unanswered: tuple[str, ...] = ()
    problems: int = 0
    stopped: bool = False
    aup: float = 0.0


def finished(trials: Sequence[TuneTrial]) -> list[TuneTrial]:
    """The trials that were measured on all problems."""
    return [trial for trial in trials if not trial.stopped]


def best_trial(trials: Sequence[TuneTrial]) -> TuneTrial:
    """The highest score of the finished trials; among equals the more accurate, then the faster, then the earlier."""
    whole = finished(trials)
    require(bool(whole), "trials", 0, "at least one finished trial")
    return max(whole, key=lambda trial: (trial.score, trial.accuracy, trial.tpf, -trial.number))


def pareto_front(trials: Sequence[TuneTrial], speed: Literal["tpf", "tps"] = "tpf") -> list[TuneTrial]:
    """The finished trials that no other beats in one of accuracy and speed without losing in the other, by rising
    speed."""
    front: list[TuneTrial] = []
    for trial in sorted(finished(trials), key=lambda trial: (-getattr(trial, speed), -trial.accuracy, trial.number)):
        if not front or trial.accuracy > front[-1].accuracy:
            front.append(trial)
    return front[::-1]
