"""Races over shards: a trial that cannot win any more is stopped before it has seen all problems.

Problems are dealt into shards at random, so that those seen are a sample of all. A trial is compared with finished
ones problem by problem, on the problems that both have decoded. What it may reach on all of them is bounded from above,
for accuracy and for TPF apart, by Student's t at 99.5 % of the mean paired difference with the correction for a finite
population; together at 99 % a look. A trial is stopped where not even both bounds at once would win. The normal theory
is poor for a few problems and for differences that are all alike: no trial is judged on fewer than `FEWEST`, and one
more problem is added that the trial alone has right. TPS has no figure a problem, so its bound is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from d3llm_ray.tuning.objective import SearchObjective
from d3llm_ray.tuning.outcomes import Outcomes, accuracy_of, read_outcomes, tpf_of

FEWEST = 10
CONFIDENCE = 0.995  # of each of the two bounds


@dataclass(frozen=True)
class Rival:
    """A trial that has seen all problems."""

    tps: float
    outcomes: Outcomes

    @property
    def accuracy(self) -> float:
        return accuracy_of(self.outcomes)

    @property
    def tpf(self) -> float:
        return tpf_of(self.outcomes)

    def score(self, objective: SearchObjective) -> float:
        return objective.score(self.tpf, self.accuracy, self.tps)


@dataclass(frozen=True)
class Outlook:
    """What a trial is expected to reach on all problems, and what it may reach at most."""

    accuracy: float
    tpf: float
    highest_accuracy: float
    highest_tpf: float


def t_quantile(confidence: float, freedom: int) -> float:
    """Student's t from the normal quantile by Fisher and Cornish's expansion; off by less than 0.01 from 9 degrees of
    freedom and at up to 99.5 %."""
    z = NormalDist().inv_cdf(confidence)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(sum(term / freedom**power for power, term in enumerate(terms)))


def outlook(trial: Outcomes, rival: Outcomes) -> Outlook:
    """Compare a trial that has seen some problems with a rival that has seen these first and then all others."""
    seen, count = len(trial), len(rival)
    if seen == count:
        accuracy, tpf = accuracy_of(trial), tpf_of(trial)
        return Outlook(accuracy, tpf, accuracy, tpf)
    same = rival[:seen]
    differences = (trial[:, 0] - same[:, 0]).astype(float)
    accuracy = min(max(accuracy_of(rival) + 100 * differences.mean(), 0.0), 100.0)
    tpf = max(tpf_of(rival) + tpf_of(trial) - tpf_of(same), 0.0)
    if seen < FEWEST:
        return Outlook(accuracy, tpf, 100.0, math.inf)
    shrink = math.sqrt(1 - seen / count)  # as the rest of the problems shrinks, so does the doubt
    padded = np.append(differences, 1.0)
    spread = t_quantile(CONFIDENCE, seen) * padded.std(ddof=1) / math.sqrt(seen + 1)
    most = 100 * (trial[:, 0].sum() + count - seen) / count  # all others right
    highest = min(max(accuracy_of(rival) + 100 * (padded.mean() + spread * shrink), 0.0), most)
    residuals = _residuals(trial) - _residuals(same)
    doubt = t_quantile(CONFIDENCE, seen - 1) * residuals.std(ddof=1) / math.sqrt(seen)
    return Outlook(accuracy, tpf, highest, tpf + doubt * shrink)


def _residuals(outcomes: Outcomes) -> npt.NDArray[np.float64]:
    """How far each problem is from the common ratio of tokens to forwards: their mean error is the ratio's."""
    tokens, forwards = outcomes[:, 1].astype(float), outcomes[:, 2].astype(float)
    return np.asarray((tokens - tpf_of(outcomes) * forwards) / max(forwards.mean(), 1e-9))


def is_hopeless(objective: SearchObjective, trial: Outcomes, finished: Sequence[Rival]) -> bool:
    """Whether a trial cannot win any more: the best finished one has a higher score than it may reach, or, where a
    front is searched, one of them is better in accuracy and speed."""
    if not finished or len(trial) < FEWEST:
        return False
    if objective.goals == ("score",):
        best = best_rival(objective, finished)
        most = outlook(trial, best.outcomes)
        return objective.score(most.highest_tpf, most.highest_accuracy, math.inf) < best.score(objective)
    if objective.speed == "tps":
        return False
    return any(_is_behind(outlook(trial, rival.outcomes), rival) for rival in finished)


def _is_behind(most: Outlook, rival: Rival) -> bool:
    return rival.accuracy > most.highest_accuracy and rival.tpf > most.highest_tpf


class Racing(FIFOScheduler):
    """Stops hopeless trials. It keeps nothing: what it needs is in the trials, also in those of a restored search."""

    def __init__(self, objective: SearchObjective) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._objective = objective

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if not result["shards_left"]:
            return TrialScheduler.CONTINUE  # it ends by itself
        rivals = _finished(tune_controller.get_trials(), trial)
        hopeless = is_hopeless(self._objective, read_outcomes(result["outcomes"]), rivals)
        return TrialScheduler.STOP if hopeless else TrialScheduler.CONTINUE


class ExpectedFigures(Callback):
    """Replaces the figures of a trial's first shards by what they let expect of all problems.

    So a shard that happens to be easy does not make a stopped trial look good to the sampler.
    """

    def __init__(self, objective: SearchObjective) -> None:
        self._objective = objective

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        rivals = _finished(trials, trial)
        if not result["shards_left"] or not rivals:
            return
        expected = outlook(read_outcomes(result["outcomes"]), best_rival(self._objective, rivals).outcomes)
        result.update(accuracy=expected.accuracy, tpf=expected.tpf)
        result["score"] = self._objective.score(expected.tpf, expected.accuracy, result["tps"])
        result["aup"] = self._objective.aup(expected.tpf, expected.accuracy)


def best_rival(objective: SearchObjective, rivals: Sequence[Rival]) -> Rival:
    return max(rivals, key=lambda rival: (rival.score(objective), rival.accuracy, rival.tpf))


def _finished(trials: Sequence[Trial], other: Trial) -> list[Rival]:
    """The trials but one that have seen all problems."""
    results = [trial.last_result for trial in trials if trial.trial_id != other.trial_id and trial.last_result]
    whole = [result for result in results if result.get("shards_left") == 0]
    return [Rival(float(result["tps"]), read_outcomes(result["outcomes"])) for result in whole]
