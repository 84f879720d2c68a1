"""lm-eval's words for a generation: those of lm-eval's own models, and nothing that is not known."""

from __future__ import annotations

from typing import Any

import pytest

from d3llm_ray.errors import InputError
from d3llm_ray.harness.generation import LENGTHS, generation_options

CASES: list[dict[str, Any]] = [
    {},
    {"until": ["\n\n"], "max_gen_toks": 32, "do_sample": False, "temperature": 0.0},
    {"until": "Q:", "max_new_tokens": 7},
    {"until": None, "max_tokens": 9, "max_completion_tokens": 3},
    {"max_completion_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
    {"do_sample": True, "temperature": 0.2},
    {"do_sample": False, "temperature": 0.8, "max_gen_toks": 5, "max_tokens": 6},
    {"temperature": 0.5},
]


@pytest.mark.parametrize("gen_kwargs", CASES)
def test_as_lm_eval_reads_them(gen_kwargs: dict[str, Any]) -> None:
    utilities = pytest.importorskip("lm_eval.models.utils")
    theirs = utilities.normalize_gen_kwargs({key: value for key, value in gen_kwargs.items() if value is not None}, 256)
    ours = generation_options(gen_kwargs, 256)
    assert ours["max_tokens"] == theirs["max_gen_toks"]
    assert ours["stop"] == tuple(theirs["until"])
    assert ours["temperature"] == theirs.get("temperature", 0.0)
    assert bool(ours["temperature"]) == theirs["do_sample"]
    assert ours["top_p"] == gen_kwargs.get("top_p", 1.0) and ours["top_k"] == gen_kwargs.get("top_k", 0)


def test_lengths_in_lm_evals_order_of_precedence() -> None:
    given = {name: number for number, name in enumerate(LENGTHS, start=1)}
    assert LENGTHS == ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    for number in range(1, 5):
        assert generation_options(given, 256)["max_tokens"] == number
        given.pop(LENGTHS[number - 1])
    assert generation_options(given, 256)["max_tokens"] == 256


def test_do_sample_false_is_greedy_whatever_the_temperature() -> None:
    assert generation_options({"do_sample": False, "temperature": 0.8}, 8)["temperature"] == 0.0
    assert generation_options({"temperature": 0.8}, 8)["temperature"] == 0.8


def test_empty_stop_strings_stop_nothing() -> None:
    assert generation_options({"until": ["", "\n", ""]}, 8)["stop"] == ("\n",)


@pytest.mark.parametrize(
    "gen_kwargs, words",
    [
        ({"num_beams": 4}, "gen_kwargs: unknown value 'num_beams'; accepted: do_sample, max_completion_tokens"),
        ({"until": 3}, "gen_kwargs: until: got 3; accepted: a text or a list of texts"),
        ({"until": ["a", 3]}, "gen_kwargs: until"),
        ({"do_sample": "yes"}, "gen_kwargs: do_sample: got 'yes'; accepted: true or false"),
        ({"do_sample": True}, "gen_kwargs: temperature: got 0.0; accepted: above 0 with do_sample"),
        ({"do_sample": True, "temperature": 0.0}, "gen_kwargs: temperature"),
    ],
)
def test_what_is_not_known_or_contradicts_itself_is_refused(gen_kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        generation_options(gen_kwargs, 8)
    assert words in str(caught.value)
