"""Two rows on the same problems: figures by hand and of Newcombe's paper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from d3llm_ray.evaluation.comparisons import compare, mcnemar, paired_interval, problems_for
from d3llm_ray.evaluation.report import score
from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow, summarise


def row(decoder: str, right: str, task: str = "arith") -> EvaluationRow:
    """`right`: 1 or 0 of every problem."""
    samples = [EvaluatedSample(f"p{n}", "", "1", "1", each == "1", 6, 3, 4, "stop") for n, each in enumerate(right)]
    labels: dict[str, Any] = {"model": "m", "decoder": decoder, "task": task, "settings": {"decoder": decoder}}
    labels |= {"max_tokens": 8, "temperature": 0.0, "seed": 0, "warmup": 0, "max_batch_size": 1}
    return summarise(samples, 1.0, **labels)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(12, 2) == pytest.approx(2 * (1 + 14 + 91) / 2**14)
    assert mcnemar(2, 12) == mcnemar(12, 2)
    assert (mcnemar(0, 0), mcnemar(5, 5), mcnemar(0, 3)) == (1.0, 1.0, 0.25)


def test_the_interval_of_a_paired_difference_is_the_published_one() -> None:
    """Newcombe 1998, 36, 12, 2 and 0 of 50 problems, method 10: 0.0569 to 0.3404 (of a minus b)."""
    low, high = paired_interval(36, 12, 2, 0)
    assert (-high, -low) == (pytest.approx(0.0569, abs=5e-5), pytest.approx(0.3404, abs=5e-5))
    assert paired_interval(10, 0, 0, 0) == (pytest.approx(-0.2775, abs=5e-5), pytest.approx(0.2775, abs=5e-5))


def test_every_two_rows_of_the_same_problems_are_compared() -> None:
    rows = [row("d3llm", "1101"), row("d2f", "1010"), row("vanilla", "110"), row("d3llm", "1111", "other")]
    (found,) = compare(rows)
    assert (found.a, found.b, found.both_right, found.only_a, found.only_b, found.both_wrong) == (0, 1, 1, 2, 1, 0)
    assert (found.difference, found.p_value) == (-25.0, 1.0)
    assert [(each.a, each.b) for each in compare([rows[0], rows[1], replace(rows[1])])] == [(0, 1), (0, 2), (1, 2)]
    report = score(rows)
    assert report.to_dict()["comparisons"][0]["only_a"] == 2
    assert "| m | arith | d2f | d3llm | 1 | 2 | -25.0 (" in report.to_markdown()


def test_rows_with_too_few_problems_for_their_interval_are_named() -> None:
    assert (problems_for(5.0), problems_for(2.0)) == (385, 2401)
    few, enough = row("d3llm", "10" * 190), row("d2f", "10" * 193)
    assert "Too few problems" not in score([enough]).to_markdown()
    assert score([few, enough]).to_markdown().endswith("(385 are always enough): m, d3llm, arith: 380\n")
