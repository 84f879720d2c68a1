"""Scores of trials by hand, the choice among them, and the records they leave."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.aup import aup
from d3llm_ray.tuning.held_out import HeldOutRun, compare
from d3llm_ray.tuning.importance import map_axes
from d3llm_ray.tuning.objective import SearchObjective, TuneTrial, best_trial, pareto_front, smooth_aup
from d3llm_ray.tuning.plots import interpolated
from d3llm_ray.tuning.records import write_records
from d3llm_ray.tuning.space import SearchSpace
from tests.tuning.test_racing import outcomes

SPACE = SearchSpace(
    decoder="d3llm",
    parameters={"entropy_threshold": {"type": "float", "low": 0.1, "high": 1.0}},
    decoder_settings={"cache_delay": 2},
)


def _trial(number: int, tpf: float, accuracy: float, score: float = 0.0, threshold: float = 0.3) -> TuneTrial:
    return TuneTrial(number, {"entropy_threshold": threshold}, score, accuracy, tpf, tpf * 10, 100, 50, 1.0)


def test_aup_objective_by_hand():
    objective = SearchObjective("aup", anchor=(0.5, 80.0), max_accuracy_drop=0.0)
    assert objective.score(4.5, 80.0, 1.0) == pytest.approx(0.5 * 80 + 4 * 80)
    assert objective.score(4.5, 78.0, 1.0) == pytest.approx(40 + 2 * (80 + 78 * 0.927743), abs=1e-3)
    assert objective.score(9.0, 70.0, 1.0) == pytest.approx(40.0)  # more than five points lost: the anchor alone
    assert objective.score(0.0, 0.0, 1.0) == 0.0


ANCHORS = st.tuples(st.floats(0.1, 4.0), st.floats(1.0, 100.0))
ACCURACIES, SPEEDS = st.floats(0.0, 100.0), st.floats(0.05, 30.0)


@given(ANCHORS, SPEEDS, ACCURACIES)
def test_smooth_aup_is_aup_where_no_point_is_below_the_offset(anchor, tpf, accuracy):
    assume(tpf > anchor[0] and accuracy >= anchor[1] - 5)
    assert smooth_aup(anchor, (tpf, accuracy)) == pytest.approx(aup([anchor, (tpf, accuracy)], anchor[1]))


@given(ANCHORS, SPEEDS, ACCURACIES, st.floats(0.0, 5.0), st.floats(0.0, 20.0))
def test_smooth_aup_rises_with_speed_and_accuracy(anchor, tpf, accuracy, faster, better):
    score = smooth_aup(anchor, (tpf, accuracy))
    assert smooth_aup(anchor, (tpf + faster, accuracy)) >= score - 1e-9
    assert smooth_aup(anchor, (tpf, min(100.0, accuracy + better))) >= score - 1e-9


@given(ANCHORS, SPEEDS, ACCURACIES)
def test_smooth_aup_has_no_cliff(anchor, tpf, accuracy):
    """A step of a millionth changes it by little anywhere: at the offset, at the anchor's TPF, and elsewhere."""
    points = [(tpf, accuracy), (tpf, max(0.0, anchor[1] - 5)), (anchor[0], accuracy)]
    for rho, y in points:
        for step in ((1e-6, 0.0), (0.0, 1e-6), (-1e-6, -1e-6)):
            moved = (rho + step[0], min(100.0, max(0.0, y + step[1])))
            assert smooth_aup(anchor, moved) == pytest.approx(smooth_aup(anchor, (rho, y)), abs=5e-3)


def test_smooth_aup_by_hand():
    assert smooth_aup((0.5, 80.0), (9.0, 70.0)) == pytest.approx(
        40 + 8.5 * (80 + 70 * 0.687289) / 2 * math.exp(-3), abs=1e-3
    )
    assert smooth_aup((0.5, 80.0), (9.0, 0.0)) == pytest.approx(40, abs=1e-9)  # fast and always wrong
    assert smooth_aup((0.5, 80.0), (0.25, 90.0)) == 20.0
    smooth = SearchObjective("smooth-aup", (0.5, 80.0), 0.0)
    assert smooth.score(9.0, 70.0, 1.0) == smooth_aup((0.5, 80.0), (9.0, 70.0))
    assert smooth.goals == ("score",) and smooth.aup(9.0, 70.0) == 40.0


@pytest.mark.parametrize("speed", ["tpf", "tps"])
def test_two_objectives_are_both_searched_and_one_point_is_chosen(speed):
    both = SearchObjective(f"accuracy-{speed}", (1.0, 80.0), 2.0)
    assert both.goals == ("accuracy", speed) and both.speed == speed
    assert both.score(4.0, 79.0, 90.0) == {"tpf": 4.0, "tps": 90.0}[speed]
    assert both.score(9.0, 70.0, 500.0) == pytest.approx(-8.0)


def test_stopped_trials_are_never_chosen():
    trials = [replace(_trial(0, 9.0, 95, 50), stopped=True), _trial(1, 2.0, 80, 5), _trial(2, 1.5, 90, 4)]
    assert best_trial(trials).number == 1
    assert [trial.number for trial in pareto_front(trials)] == [2, 1]
    with pytest.raises(InputError, match="at least one finished trial"):
        best_trial(trials[:1])


def test_the_front_of_tokens_a_second():
    trials = [replace(_trial(0, 1.0, 90), tps=50.0), replace(_trial(1, 9.0, 80), tps=20.0)]
    assert [trial.number for trial in pareto_front(trials, "tps")] == [0]


def test_speed_objectives_count_only_above_the_floor():
    for metric, expected in (("tpf", 4.0), ("tps", 90.0)):
        objective = SearchObjective(metric, anchor=(1.0, 80.0), max_accuracy_drop=2.0)
        assert objective.score(4.0, 78.0, 90.0) == expected
        assert objective.score(9.0, 77.0, 500.0) == pytest.approx(-1.0)
        assert objective.score(9.0, 60.0, 500.0) == pytest.approx(-18.0)


def test_an_anchor_that_ranks_nothing_is_refused():
    with pytest.raises(InputError, match=r"metric.*tpf or tps"):
        SearchObjective("aup", anchor=(1.0, 0.0), max_accuracy_drop=2.0)
    with pytest.raises(InputError, match="anchor"):
        SearchObjective("tpf", anchor=(1.0, 101.0), max_accuracy_drop=2.0)
    assert SearchObjective("tpf", anchor=(1.0, 0.0), max_accuracy_drop=2.0).score(3.0, 0.0, 1.0) == 3.0


def test_ties_go_to_accuracy_then_speed_then_the_earlier_trial():
    trials = [
        _trial(0, 2.0, 80, 5),
        _trial(1, 3.0, 82, 5),
        _trial(2, 4.0, 82, 5),
        _trial(3, 4.0, 82, 5),
        _trial(4, 9.0, 90, 1),
    ]
    assert best_trial(trials).number == 2
    with pytest.raises(InputError, match="trials"):
        best_trial([])


def test_pareto_front_leaves_out_what_is_beaten():
    trials = [
        _trial(0, 1.0, 90),
        _trial(1, 2.0, 88),
        _trial(2, 1.5, 85),
        _trial(3, 4.0, 88),
        _trial(4, 5.0, 50),
        _trial(5, 4.0, 80),
    ]
    assert [trial.number for trial in pareto_front(trials)] == [0, 3, 4]


def test_records_agree_with_the_trials(tmp_path):
    trials = [_trial(0, 2.0, 80, 10, 0.45), _trial(1, 4.0, 79, 30, 0.6), _trial(2, 5.0, 70, 20, 0.9)]
    objective = SearchObjective("aup", (0.5, 80.0), 2.0)
    runs = [HeldOutRun(name, {"decoder": name}, outcomes(70, 4.0), 10.0) for name in ("chosen", "own")]
    path = write_records(tmp_path, SPACE, objective, trials, compare(*runs, None, objective, 0))
    assert yaml.safe_load(path.read_text()) == {"decoder": "d3llm", "cache_delay": 2, "entropy_threshold": 0.6}
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["number"], float(row["entropy_threshold"]), float(row["tpf"])) for row in rows] == [
        ("0", 0.45, 2.0),
        ("1", 0.6, 4.0),
        ("2", 0.9, 5.0),
    ]
    content = json.loads((tmp_path / "trials.json").read_text())
    assert content["best"] == 1 and content["objective"]["anchor"] == [0.5, 80.0] and len(content["trials"]) == 3
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert content["held_out"]["verdict"].startswith("The chosen settings do NOT beat")
    assert "**The chosen settings do NOT beat the decoder's own" in (tmp_path / "report.md").read_text()
    front = json.loads((tmp_path / "pareto.json").read_text())["front"]
    assert [point["settings"]["entropy_threshold"] for point in front] == [0.45, 0.6, 0.9]
    assert {file.name for file in tmp_path.iterdir()} == {
        *("settings.yaml", "trials.csv", "trials.json", "pareto.png", "pareto.json", "report.md")
    }


def test_records_of_two_parameters(tmp_path):
    """The setting that decides everything is the important one, and the heat map shows both."""
    space = SearchSpace(
        decoder="d3llm",
        parameters={
            "entropy_threshold": {"type": "log_float", "low": 0.1, "high": 1.0},
            "cache_delay": {"type": "int", "low": 1, "high": 4},
            "refresh_interval": {"type": "choice", "values": [4, 8, 10000]},
        },
    )
    trials = []
    for number in range(30):
        threshold, delay, refresh = 0.1 * 10 ** (number / 29), 1 + number % 4, (4, 8, 10000)[number % 3]
        values = {"entropy_threshold": threshold, "cache_delay": delay, "refresh_interval": refresh}
        trial = TuneTrial(number, values, 100 * threshold, 80.0, 2.0, 9.0, 9, 5, 1.0, stopped=number == 3)
        trials.append(trial)
    write_records(tmp_path, space, SearchObjective("aup", (0.5, 80.0), 2.0), trials)
    shares = json.loads((tmp_path / "trials.json").read_text())["importance"]
    assert next(iter(shares)) == "entropy_threshold" and shares["entropy_threshold"] > 0.7
    assert sum(shares.values()) == pytest.approx(1.0)
    assert (tmp_path / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "report.md").read_text()
    assert "entropy_threshold x refresh_interval, interpolated from the trials" in report
    assert "30 trials, 1 of them stopped early" in report and "None were kept apart" in report
    assert map_axes(space, shares) == ("entropy_threshold", "refresh_interval")
    assert map_axes(SPACE, {}) is None


def test_the_heat_map_interpolates():
    places = np.array([[0.1, 0.1], [0.9, 0.9]])
    found = interpolated(places, np.array([1.0, 3.0]), np.array([[0.1, 0.1], [0.5, 0.5], [0.9, 0.9], [0.9, 50.0]]))
    assert found == pytest.approx([1.0, 2.0, 3.0, 3.0], abs=1e-6)
