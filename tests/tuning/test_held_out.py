"""The comparison on held-out problems: figures and intervals by other means, and a verdict that does not flatter."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from d3llm_ray.config import build
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.aup import aup
from d3llm_ray.tasks import Problem
from d3llm_ray.tuning.held_out import HeldOutRun, compare
from d3llm_ray.tuning.objective import SearchObjective, TuneTrial
from d3llm_ray.tuning.run import held_out_numbers
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.tuning.summary import held_out_lines
from tests.tuning.test_racing import outcomes

AUP = SearchObjective("aup", (1.0, 80.0), 2.0)


def run(name: str, accuracy: float, tpf: float, seed: int = 0, tps: float = 10.0) -> HeldOutRun:
    return HeldOutRun(name, {"decoder": name}, outcomes(accuracy, tpf, seed=seed), tps)


def test_figures_are_those_of_the_problems_and_intervals_those_of_the_textbook() -> None:
    chosen, own, plain = run("chosen", 78, 6.0), run("own", 80, 4.0, 1), run("vanilla", 82, 1.0, 2)
    found = compare(chosen, own, plain, AUP, seed=0)
    point = found.rows[0].figures
    rho = chosen.outcomes[:, 1].sum() / chosen.outcomes[:, 2].sum()
    assert point["accuracy"].value == 78.0 and point["tpf"].value == pytest.approx(rho)
    assert point["accuracy"].low == pytest.approx(68.93, abs=0.01)  # Wilson, 78 of 100
    assert point["accuracy"].high == pytest.approx(85.00, abs=0.01)
    assert point["aup"].value == point["score"].value == pytest.approx(aup([(1.0, 82.0), (rho, 78.0)], 82.0))
    # The normal interval of a mean difference: with many problems the bootstrap's is the same.
    differences = (chosen.outcomes[:, 0] - own.outcomes[:, 0]).astype(float)
    half = 196 * differences.std(ddof=1) / 10
    bounds = found.differences["accuracy"]
    assert bounds.value == pytest.approx(-2.0)
    assert (bounds.low, bounds.high) == (pytest.approx(-2 - half, abs=1.5), pytest.approx(-2 + half, abs=1.5))
    assert found.gained - found.lost == -2 and found.problems == 100
    assert [row.name for row in found.rows] == ["chosen", "own", "vanilla"]
    assert compare(chosen, own, plain, AUP, seed=0) == found


def test_the_same_problems_are_drawn_for_both() -> None:
    """Two decoders that differ nowhere in accuracy: drawn apart, their difference would have an interval."""
    found = compare(run("chosen", 70, 4.0), run("own", 70, 3.0), None, AUP, 0)
    assert (found.differences["accuracy"].low, found.differences["accuracy"].high) == (0.0, 0.0)
    assert found.rows[0].figures["aup"].value == pytest.approx(80.0)  # the given anchor: ten points are lost


@pytest.mark.parametrize(
    ("chosen", "own", "metric", "verdict"),
    [
        (run("chosen", 80, 6.0), run("own", 80, 4.0), "aup", "The chosen settings beat the decoder's own on held-out"),
        (run("chosen", 60, 6.0), run("own", 80, 4.0), "aup", "do NOT beat"),
        (run("chosen", 80, 4.02), run("own", 80, 4.0, 7), "aup", "ahead on held-out problems, but within chance|NOT"),
        (run("own", 80, 4.0), run("own", 80, 4.0), "aup", "chose the decoder's own settings"),
        (run("chosen", 80, 4.0, 0, 30.0), run("own", 80, 4.0, 0, 20.0), "tps", "beat .*30 against 20 tokens/s, one m"),
        (run("chosen", 80, 4.0, 0, 20.0), run("own", 80, 4.0, 0, 20.0), "tps", "do NOT beat"),
    ],
)
def test_the_verdict_is_plain(chosen: HeldOutRun, own: HeldOutRun, metric: Any, verdict: str) -> None:
    plain = run("vanilla", 80, 1.0)
    found = compare(chosen, own, plain, SearchObjective(metric, (1.0, 80.0), 2.0), 0)
    assert re.search(verdict, found.verdict)
    assert found.to_dict()["verdict"] == found.verdict


def test_what_chance_may_do_is_no_win() -> None:
    """Ahead by three problems of a hundred, but solved by chance: the interval of the difference includes 0."""
    chosen, own, plain = run("chosen", 80, 4.0, 1), run("own", 77, 4.0, 2), run("vanilla", 80, 1.0, 3)
    found = compare(chosen, own, plain, SearchObjective("smooth-aup", (1.0, 80.0), 2.0), 0)
    assert found.differences["score"].value > 0 > found.differences["score"].low
    assert "ahead on held-out problems, but within chance (smooth-aup +" in found.verdict


def test_an_anchor_that_solves_nothing_ranks_nothing() -> None:
    found = compare(run("c", 0, 4.0), run("o", 0, 3.0), run("v", 0, 1.0), SearchObjective("tpf", (1.0, 0.0), 2.0), 0)
    assert list(found.rows[0].figures) == ["accuracy", "tpf", "score"]
    assert found.differences["score"].value == pytest.approx(found.differences["tpf"].value) and "beat" in found.verdict


def problem(number: int) -> Problem:
    return Problem(f"id{number}", [{"role": "user", "content": f"{number} + 1?"}], str(number + 1))


def test_problems_that_are_held_out_were_not_searched() -> None:
    settings = TuneSettings(count=6, held_out=3, actors=2)
    assert held_out_numbers([*map(problem, range(9))], settings) == [6, 7, 8]
    again = [*map(problem, range(6)), problem(2), problem(7), problem(0)]
    assert held_out_numbers(again, settings) == [7]
    assert held_out_numbers([*map(problem, (0, 1, 2, 3, 4, 5, 1, 2, 3))], settings) == []
    assert held_out_numbers([*map(problem, range(7))], settings) == [6]
    none = settings.model_copy(update={"held_out": 0})
    assert held_out_numbers([*map(problem, range(4))], none) == []
    with pytest.raises(InputError, match="actors: got 2 for 1 problems"):
        held_out_numbers([problem(0)], none)


def test_the_bootstrap_has_its_resamples() -> None:
    found = compare(run("chosen", 70, 4.0), run("own", 72, 4.0, 3), None, AUP, 0)
    spread = found.differences["accuracy"].high - found.differences["accuracy"].low
    assert spread == pytest.approx(2 * 1.96 * 100 * np.sqrt(2 * 0.7 * 0.29) / 10, rel=0.25)


def test_gained_and_lost_problems_have_the_p_value_of_their_binomial() -> None:
    """5 gained and 1 lost: 2 * (1 + 6) / 2**6 by hand."""
    right = np.array([[1, 1], [1, 0], [1, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0, 0]])
    figures = np.tile([4, 2], (8, 1))
    runs = [HeldOutRun(str(n), {"n": n}, np.column_stack([right[:, n], figures]), 1.0) for n in range(2)]
    found = compare(*runs, None, AUP, 0)
    assert (found.gained, found.lost, found.p_value) == (5, 1, 14 / 64)
    best = TuneTrial(0, {}, 1.0, 75.0, 2.0, 1.0, 1, 1, 1.0)
    assert (
        "only the chosen settings solve: 5; that only the own ones solve: 1 (exact McNemar test, two-sided: p = 0.22)."
        in "\n".join(held_out_lines(found, best))
    )


@pytest.mark.parametrize("accuracy", [0.81, 1.0, 0.004])
def test_an_anchors_accuracy_is_in_percent(accuracy: float) -> None:
    with pytest.raises(
        InputError, match=f"^anchor: got accuracy {accuracy:g}; accepted: percent, 0 to 100, such as 81"
    ):
        build(TuneSettings, {"anchor": (1.5, accuracy)})
    for accepted in (0.0, 1.01, 81.0):
        assert build(TuneSettings, {"anchor": (1.5, accepted)}).anchor == (1.5, accepted)
