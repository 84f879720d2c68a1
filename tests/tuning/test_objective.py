"""Scores of trials by hand, the choice among them, and the records they leave."""

from __future__ import annotations

import csv
import json

import pytest
import yaml

from d3llm_ray.errors import InputError
from d3llm_ray.tuning.objective import SearchObjective, TuneTrial, best_trial, pareto_front
from d3llm_ray.tuning.records import write_records
from d3llm_ray.tuning.space import SearchSpace

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
    path = write_records(tmp_path, SPACE, objective, trials)
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
    assert {file.name for file in tmp_path.iterdir()} == {"settings.yaml", "trials.csv", "trials.json", "pareto.png"}
