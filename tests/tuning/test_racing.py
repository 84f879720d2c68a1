"""Races without Ray: the bounds by hand and by repetition, and what they may stop."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from d3llm_ray.tuning.objective import SearchObjective
from d3llm_ray.tuning.outcomes import Outcomes, accuracy_of, deal, read_outcomes, tpf_of, write_outcomes
from d3llm_ray.tuning.racing import ExpectedFigures, Outlook, Racing, Rival, is_hopeless, outlook, t_quantile

AUP = SearchObjective("aup", (1.0, 80.0), 2.0)


def outcomes(accuracy: float, tpf: float, count: int = 100, seed: int = 0) -> Outcomes:
    """Problems with this share right, and forwards of 10 in the mean."""
    rng = np.random.default_rng(seed)
    forwards = rng.integers(5, 16, count)
    right = rng.permutation(count) < round(accuracy / 100 * count)
    return np.stack([right, np.round(tpf * forwards), forwards], 1).astype(np.int64)


@pytest.mark.parametrize(
    ("confidence", "freedom", "published"),
    [(0.995, 9, 3.250), (0.995, 24, 2.797), (0.995, 99, 2.626), (0.975, 10, 2.228), (0.95, 30, 1.697)],
)
def test_students_t_is_that_of_the_tables(confidence: float, freedom: int, published: float) -> None:
    assert t_quantile(confidence, freedom) == pytest.approx(published, abs=0.01)


def test_all_problems_are_dealt_once_at_random_and_always_alike() -> None:
    shards = deal(103, 4, 7)
    assert sorted(number for shard in shards for number in shard) == list(range(103))
    assert {len(shard) for shard in shards} == {25, 26} and deal(103, 4, 7) == shards != deal(103, 4, 8)
    assert all(20 < np.mean(shard) < 80 for shard in shards)  # a task's order does not make the shards differ
    assert deal(5, 1, 0) == [[0, 1, 2, 3, 4]]


def test_outcomes_are_kept_as_they_are() -> None:
    found = outcomes(70, 3.0)
    assert (read_outcomes(write_outcomes(found)) == found).all() and len(read_outcomes("[]")) == 0
    assert accuracy_of(found) == 70.0 and tpf_of(found) == found[:, 1].sum() / found[:, 2].sum()
    assert tpf_of(found * [1, 1, 0]) == 0.0


def test_an_outlook_by_hand() -> None:
    """The rival has 7 of 20 right, 4 of them among the first 12; the trial has 6 of these 12."""
    rival = np.array([[k < 4 or k >= 17, 20, 10] for k in range(20)], dtype=np.int64)
    trial = np.array([[k < 6, 24, 8] for k in range(12)], dtype=np.int64)
    most = outlook(trial, rival)
    assert most.accuracy == pytest.approx(35 + 100 * 2 / 12) and most.tpf == pytest.approx(2 + 3 - 2)
    differences = [0] * 4 + [1] * 2 + [0] * 6 + [1]  # and one more that the trial alone has right
    mean, deviation = np.mean(differences), np.std(differences, ddof=1)
    bound = mean + 3.055 * deviation / math.sqrt(13) * math.sqrt(8 / 20)
    assert most.highest_accuracy == pytest.approx(min(35 + 100 * bound, 100 * 14 / 20), abs=0.3)
    assert most.highest_tpf == pytest.approx(3.0)  # every problem has this ratio: no doubt is left


def test_with_all_problems_seen_nothing_is_in_doubt_and_with_few_everything() -> None:
    trial, rival = outcomes(60, 4.0, seed=1), outcomes(70, 3.0)
    assert outlook(trial, rival) == Outlook(60.0, tpf_of(trial), 60.0, tpf_of(trial))
    few = outlook(trial[:9], rival)
    assert (few.highest_accuracy, few.highest_tpf) == (100.0, math.inf)


def test_the_bounds_hold_as_often_as_they_say() -> None:
    """Trials of random strength against a rival, looked at after a quarter and after a half."""
    rng, missed, looks = np.random.default_rng(0), 0, 0
    for seed in range(300):
        rival = outcomes(rng.uniform(40, 90), rng.uniform(2, 6), seed=2 * seed)
        trial = outcomes(rng.uniform(40, 90), rng.uniform(2, 6), seed=2 * seed + 1)
        for seen in (25, 50):
            most, looks = outlook(trial[:seen], rival), looks + 1
            above = accuracy_of(trial) > most.highest_accuracy + 1e-9 or tpf_of(trial) > most.highest_tpf + 1e-9
            missed += above
    assert missed <= 0.02 * looks  # 1 % are expected: 6 of 600


def test_what_cannot_win_is_stopped_and_what_may_is_not() -> None:
    best = Rival(100.0, outcomes(80, 4.0))
    slow, wrong, close = outcomes(80, 2.0)[:25], outcomes(20, 4.5, seed=3)[:25], outcomes(78, 4.0, seed=4)[:25]
    assert [is_hopeless(AUP, trial, [best]) for trial in (slow, wrong, close)] == [True, True, False]
    assert not is_hopeless(AUP, slow, [])  # nothing is finished yet
    assert not is_hopeless(AUP, slow, [Rival(1.0, outcomes(80, 1.5))])
    tps = SearchObjective("tps", (1.0, 80.0), 2.0)  # tokens a second of all problems are not known: accuracy alone
    assert [is_hopeless(tps, trial, [best]) for trial in (slow, wrong)] == [False, True]
    front = SearchObjective("accuracy-tpf", (1.0, 80.0), 2.0)
    worse = outcomes(20, 2.0, seed=3)[:50]
    assert is_hopeless(front, worse, [best]) and not is_hopeless(front, slow, [Rival(1.0, outcomes(70, 4.0))])
    assert not is_hopeless(SearchObjective("accuracy-tps", (1.0, 80.0), 2.0), worse, [best])


def result(found: Outcomes, shards_left: int) -> dict[str, Any]:
    figures = {"accuracy": accuracy_of(found), "tpf": tpf_of(found), "tps": 9.0, "shards_left": shards_left}
    return {**figures, "score": 0.0, "aup": 0.0, "outcomes": write_outcomes(found)}


def trial_of(name: str, last_result: dict[str, Any] | None) -> Any:
    return SimpleNamespace(trial_id=name, last_result=last_result)


def test_a_race_is_decided_by_the_trials_alone() -> None:
    best, other, slow = outcomes(80, 4.0), outcomes(60, 2.0, seed=5), outcomes(80, 2.0)
    trial = trial_of("slow", result(slow[:50], 2))
    trials = [trial_of("best", result(best, 0)), trial_of("other", result(other, 0)), trial, trial_of("new", {})]
    controller = SimpleNamespace(get_trials=lambda: trials)
    race = Racing(AUP)
    assert race.on_trial_result(controller, trial, trial.last_result) == TrialScheduler.STOP
    assert race.on_trial_result(controller, trial, result(slow, 0)) == TrialScheduler.CONTINUE  # it is finished
    trials.pop(0)
    assert race.on_trial_result(controller, trial, trial.last_result) == TrialScheduler.CONTINUE


def test_a_first_shard_that_is_easy_does_not_flatter_a_trial() -> None:
    rival = np.array([[k < 50, 40, 10] for k in range(100)], dtype=np.int64)  # all of the first half are right
    trial = trial_of("t", None)
    trials = [trial_of("rival", result(rival, 0)), trial]
    first = result(rival[:50] * [1, 2, 1], 1)
    assert first["accuracy"] == 100.0
    ExpectedFigures(AUP).on_trial_result(1, trials, trial, first)
    assert (first["accuracy"], first["tpf"], first["shards_left"]) == (50.0, 8.0, 1)
    assert first["score"] == first["aup"] == AUP.aup(8.0, 50.0)
    last = result(rival, 0)
    before = dict(last)
    ExpectedFigures(AUP).on_trial_result(1, trials, trial, last)
    assert last == before


@pytest.mark.parametrize("metric", ["aup", "smooth-aup", "tpf", "accuracy-tpf"])
def test_of_a_handful_of_problems_nothing_is_said_and_no_figure_is_impossible(metric: Any) -> None:
    objective = SearchObjective(metric, (1.0, 80.0), 2.0)
    best = Rival(1.0, np.array([[k > 0, 30, 10] for k in range(8)], dtype=np.int64))
    lucky, unlucky = np.array([[1, 90, 10]] * 4, dtype=np.int64), np.array([[0, 1, 10]] * 4, dtype=np.int64)
    for trial in (lucky, unlucky):
        assert not is_hopeless(objective, trial, [best])
        expected = outlook(trial, best.outcomes)
        assert 0 <= expected.accuracy <= 100 and expected.tpf >= 0
        assert math.isfinite(objective.score(expected.tpf, expected.accuracy, 1.0))
    far = Rival(1.0, outcomes(2, 0.1))
    trial = np.stack([np.zeros(50), np.zeros(50), np.full(50, 9)], 1).astype(np.int64)
    most = outlook(trial, far.outcomes)
    assert 0 <= most.accuracy <= most.highest_accuracy <= 100 and 0 <= most.tpf <= most.highest_tpf < math.inf
