"""What a search maximises: one score for a trial's accuracy and speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from d3llm_ray.errors import require
from d3llm_ray.evaluation.aup import Point, aup


@dataclass(frozen=True)
class SearchObjective:
    """Scores (TPF, accuracy, TPS) against the anchor, the point of the model or of its teacher decoded by `vanilla`.

    `aup`: the AUP of anchor and trial, the anchor's accuracy being the best one; settings that cost more than 5
    points score what the anchor alone does. `tpf` and `tps`: that figure, where accuracy is at most
    `max_accuracy_drop` points below the anchor's; elsewhere minus the missing points, which leads the search back.

    Raises:
        InputError: `aup` with an anchor that has no correct answer or no token; it would rank nothing.
    """

    metric: Literal["aup", "tpf", "tps"]
    anchor: Point
    max_accuracy_drop: float

    def __post_init__(self) -> None:
        tpf, accuracy = self.anchor
        require(0 <= accuracy <= 100 and tpf >= 0, "anchor", self.anchor, "(TPF of 0 or more, accuracy in percent)")
        if self.metric == "aup":
            usable = accuracy > 0 and tpf > 0
            require(
                usable, "metric", "aup", "tpf or tps, for a model whose vanilla decoding solves no problem of the task"
            )

    def score(self, tpf: float, accuracy: float, tps: float) -> float:
        """The score of one trial; higher is better."""
        if self.metric == "aup":
            # Without a token there is no parallelism to speak of, and AUP is not defined.
            return aup([self.anchor, (tpf, accuracy)], self.anchor[1]) if tpf > 0 else 0.0
        missing = self.anchor[1] - self.max_accuracy_drop - accuracy
        return -missing if missing > 0 else {"tpf": tpf, "tps": tps}[self.metric]


@dataclass(frozen=True)
class TuneTrial:
    """One measured setting; `number` counts trials in the order in which they finished.

    `errors` of the problems have no answer and count as wrong; `unanswered` names them with their reasons.
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


def best_trial(trials: Sequence[TuneTrial]) -> TuneTrial:
    """The highest score; among equals the more accurate, then the faster, then the earlier."""
    require(bool(trials), "trials", 0, "at least one finished trial")
    return max(trials, key=lambda trial: (trial.score, trial.accuracy, trial.tpf, -trial.number))


def pareto_front(trials: Sequence[TuneTrial]) -> list[TuneTrial]:
    """The trials that no other beats in one of accuracy and TPF without losing in the other, by rising TPF."""
    front: list[TuneTrial] = []
    for trial in sorted(trials, key=lambda trial: (-trial.tpf, -trial.accuracy, trial.number)):
        if not front or trial.accuracy > front[-1].accuracy:
            front.append(trial)
    return front[::-1]
