"""The oracles against hand-worked steps and windows, and against each other where two must agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from . import (
    autoregressive,
    d2f,
    d3llm,
    d3llm_nocache,
    dparallel,
    fast_dllm_dual,
    fast_dllm_prefix,
    fast_dllm_v2,
    vanilla_dream,
    vanilla_llada,
)
from .answer import Answer, Conventions, Guess, read_row
from .blockwise import select_confident
from .canvas import Canvas
from .examples import (
    CAUSAL,
    DREAM_LIKE,
    LLADA_LIKE,
    NEVER_STOPS,
    Recomputing,
    Recording,
    random_model,
    reveals_per_forward,
)
from .guidance import full_forward
from .network import Network


def test_a_row_is_read_by_hand() -> None:
    row = torch.tensor([5.0, 0.0, np.log(2), np.log(2), np.log(3), 9.0])  # mask 0, ids from 5 on outside
    guess = read_row(row, Conventions(0, 1, (1,), False, False, 5))
    halves = read_row(row, Conventions(0, 1, (1,), False, False, 4))
    assert guess.token == 4 and guess.confidence == pytest.approx(3 / 8) and guess.gap == pytest.approx(1 / 8)
    entropy = -(np.log(1 / 8) / 8 + 2 * np.log(1 / 4) / 4 + 3 * np.log(3 / 8) / 8)
    assert guess.entropy == pytest.approx(entropy, abs=1e-6)
    assert halves.token == 2 and halves.gap == 0  # the lowest id on a tie


def test_the_factor_rule_by_hand() -> None:
    guesses = {p: Guess(0, confidence, 0.0, 0.0) for p, confidence in enumerate([0.5, 0.9, 0.99, 0.8])}
    assert select_confident(guesses, 0.9, None) == [2, 1]
    assert select_confident(guesses, 0.999, None) == [2]
    assert select_confident(guesses, 0.9, factor=1.0) == [2, 1, 3]  # bounds of ranks 2, 3, 4: 0.667, 0.75, 0.8
    assert select_confident(guesses, 0.9, factor=0.25) == [2]  # bound of rank 2: 0.917


def test_steps_of_the_vanilla_decoders_by_hand() -> None:
    network, settings = Network(random_model()), {"conventions": LLADA_LIKE, "early_stop": False}
    answer = vanilla_llada.decode(network, [3, 1, 4], 10, block_size=4, steps=5, **settings)
    assert reveals_per_forward(answer) == [2, 2, 2, 2, 2]
    answer = vanilla_llada.decode(network, [3, 1, 4], 10, block_size=10, steps=4, **settings)
    assert reveals_per_forward(answer) == [3, 3, 2, 2]
    settings["conventions"] = DREAM_LIKE
    answer = vanilla_dream.decode(network, [3, 1, 4], 16, steps=4, **settings)
    assert reveals_per_forward(answer) == [3, 4, 4, 5]  # 16 x .25, 13 x .333, 9 x .499, the rest
    answer = vanilla_dream.decode(network, [3, 1, 4], 4, steps=4, **settings)
    assert reveals_per_forward(answer) == [1, 1, 2]  # 4 x .25 is below one: no forward


def test_randomness_comes_from_the_callable() -> None:
    network, settings = Network(random_model()), {"conventions": DREAM_LIKE, "early_stop": False, "steps": 4}
    asked = []

    def late(seed: int, positions: np.ndarray, count: int) -> np.ndarray:
        asked.append((seed, count))
        return np.full(len(positions), 0.9999)

    answer = vanilla_dream.decode(network, [3, 1], 8, remasking="origin", uniform=late, seed=5, **settings)
    assert reveals_per_forward(answer) == [8] and asked == [(5, 1), (5, 2), (5, 3), (5, 4)]

    def backwards(seed: int, positions: np.ndarray, count: int) -> np.ndarray:
        return positions / 100

    settings["steps"] = 8
    answer = vanilla_llada.decode(network, [3, 1], 8, remasking="random", uniform=backwards, **settings)
    assert answer.reveal_steps == [7, 6, 5, 4, 3, 2, 1, 0]


def test_guidance_extrapolates_from_the_hidden_prompt() -> None:
    network = Network(random_model())
    canvas = Canvas([3, 1, 4], 2, LLADA_LIKE, None)
    guided = full_forward(network, canvas, cfg_scale=1.5)
    conditional = network.forward([3, 1, 4, 36, 36], 0, 5, network.store())
    unconditional = network.forward([36] * 5, 0, 5, network.store())
    torch.testing.assert_close(guided[3], 2.5 * conditional[3] - 1.5 * unconditional[3])
    assert canvas.forwards == 1


@pytest.mark.parametrize("conventions", [LLADA_LIKE, DREAM_LIKE])
@pytest.mark.parametrize(("decode", "last"), [(fast_dllm_prefix.decode, 13), (fast_dllm_dual.decode, None)])
def test_windows_of_the_block_caches(decode: Callable[..., Answer], last: int | None, conventions: Conventions) -> None:
    network = Recording(random_model())
    decode(network, [3, 1, 4], 10, conventions=conventions, block_size=4, confidence_threshold=2.0, early_stop=False)
    shift, expected = int(conventions.shift), []
    for start, end in [(3, 7), (7, 11), (11, 13)]:
        expected += [(0, 13), *[(start - shift, last or end)] * (end - start - 1)]
    assert network.windows == expected


@pytest.mark.parametrize(("decode", "last"), [(fast_dllm_prefix.decode, 13), (fast_dllm_dual.decode, None)])
def test_a_block_that_its_first_forward_finishes_is_repeated(decode: Callable[..., Answer], last: int | None) -> None:
    network, settings = Recording(random_model()), {"block_size": 4, "early_stop": False, "conventions": LLADA_LIKE}
    decode(network, [3, 1, 4], 10, confidence_threshold=0.0, repeat_finished=True, **settings)
    assert network.windows == [(0, 13), (3, last or 7), (0, 13), (7, last or 11), (0, 13), (11, 13)]
    network.windows.clear()
    decode(network, [3, 1, 4], 10, confidence_threshold=0.0, **settings)
    assert network.windows == [(0, 13)] * 3


@pytest.mark.parametrize("prompt", [[3, 1, 4], [3, 1, 4, 1], [3, 1, 4, 1, 5, 9, 2]])
def test_block_causal_caches_are_exact(prompt: list[int]) -> None:
    model = random_model()
    for conventions in (LLADA_LIKE, DREAM_LIKE):
        settings = {"conventions": conventions, "block_size": 4, "confidence_threshold": 0.5}
        cached = d2f.decode(Network(model), prompt, 14, **settings)
        assert cached == d2f.decode(Recomputing(model), prompt, 14, **settings)
    settings |= {"sub_block_size": 2, "block_cache": False}
    cached = fast_dllm_v2.decode(Network(model), prompt, 14, **settings)
    assert cached == fast_dllm_v2.decode(Recomputing(model), prompt, 14, **settings)
    cached = autoregressive.decode(Network(model), prompt, 14, conventions=CAUSAL)
    assert cached == autoregressive.decode(Recomputing(model), prompt, 14, conventions=CAUSAL)


def test_windows_of_fast_dllm_v2_by_hand() -> None:
    """Prompt [0, 5), blocks [4, 8) and [8, 12), one token a forward; the limit ends the answer at 10."""
    network = Recording(random_model())
    settings = {"conventions": NEVER_STOPS, "block_size": 4, "sub_block_size": 2, "confidence_threshold": 2.0}
    fast_dllm_v2.decode(network, [3, 4, 5, 6, 7], 5, **settings)
    first_block = [(0, 8), (4, 8), (6, 8)]  # reveal 5 (with the prompt's keys), 6, then 7 from the sub-block alone
    boundary = [(4, 8)]  # reveals 8
    assert network.windows == [*first_block, *boundary, (8, 12)]


@pytest.mark.parametrize("conventions", [LLADA_LIKE, DREAM_LIKE])
def test_d3llm_without_use_of_its_cache_is_d3llm_nocache(conventions: Conventions) -> None:
    network = Network(random_model())
    settings = {"conventions": conventions, "block_size": 4, "entropy_threshold": 1.0, "early_stop": False}
    expected = d3llm_nocache.decode(network, [3, 1, 4], 14, **settings)
    never = 10**6
    for cache in (
        {"cache_delay": never},
        {"cache_delay": never, "suffix": "cached", "refresh_interval": 1},
    ):
        assert d3llm.decode(network, [3, 1, 4], 14, **settings, **cache) == expected
    settings |= {"block_size": 14, "cache_delay": 1}
    whole = d3llm.decode(network, [3, 1, 4], 14, **settings)
    assert whole == d3llm.decode(network, [3, 1, 4], 14, suffix="none", **settings)


@pytest.mark.parametrize("conventions", [LLADA_LIKE, DREAM_LIKE])
@pytest.mark.parametrize(
    ("suffix", "refresh_interval", "expected"),
    [
        ("recompute", 100, [(0, 9), (3, 9), (0, 9), (3, 9), (0, 9), (5, 9)]),
        ("recompute", 2, [(0, 9), (0, 9), (0, 9), (3, 9), (0, 9), (5, 9)]),
        ("cached", 100, [(0, 9), (3, 5), (0, 7), (3, 7), (0, 9), (5, 9)]),
        ("cached", 2, [(0, 9), (0, 9), (0, 7), (3, 7), (0, 9), (5, 9)]),
        ("none", 100, [(0, 5), (3, 5), (0, 7), (3, 7), (0, 9), (5, 9)]),
        ("none", 2, [(0, 5), (0, 5), (0, 7), (3, 7), (0, 9), (5, 9)]),
    ],
)
def test_windows_of_d3llm_by_hand(
    conventions: Conventions, suffix: str, refresh_interval: int, expected: list[tuple[int, int]]
) -> None:
    """Blocks of two tokens, one token a forward: forwards 1, 4, 6 freeze, 3 and 5 wait for a finished block."""
    network = Recording(random_model())
    settings = {"block_add_threshold": 1.0, "decoded_token_threshold": 1.0, "entropy_threshold": -1.0, "cache_delay": 1}
    settings |= {"block_size": 2, "early_stop": False, "suffix": suffix, "refresh_interval": refresh_interval}
    d3llm.decode(network, [3, 1, 4], 6, conventions=conventions, **settings)
    shift = int(conventions.shift)
    assert network.windows == [(max(start - shift, 0), end) for start, end in expected]


@pytest.mark.parametrize("conventions", [LLADA_LIKE, NEVER_STOPS])
@pytest.mark.parametrize(
    ("block_add_threshold", "expected"),
    [(1.0, [(0, 5), (3, 5), (3, 7), (5, 7)]), (0.5, [(0, 5), (3, 7), (3, 7), (5, 7)])],
)
def test_windows_of_d2f_by_hand(
    conventions: Conventions, block_add_threshold: float, expected: list[tuple[int, int]]
) -> None:
    """Nothing is confident: the activated block reveals one token a forward, the one added early none."""
    network = Recording(random_model())
    settings = {"block_size": 2, "confidence_threshold": 2.0, "decoded_token_threshold": 1.0}
    conventions = replace(conventions, stop_ids=())
    d2f.decode(network, [3, 1, 4], 4, conventions=conventions, block_add_threshold=block_add_threshold, **settings)
    shift = int(conventions.shift)
    assert network.windows == [(max(start - shift, 0), end) for start, end in expected]


CANVAS_DECODERS = [
    vanilla_llada.decode,
    vanilla_dream.decode,
    fast_dllm_prefix.decode,
    fast_dllm_dual.decode,
    dparallel.decode,
    d3llm_nocache.decode,
    d3llm.decode,
    d2f.decode,
    fast_dllm_v2.decode,
]


@pytest.mark.parametrize("decode", CANVAS_DECODERS)
def test_a_limit_only_ends_the_answer_sooner(decode: Callable[..., Answer]) -> None:
    network = Network(random_model())
    settings = {"conventions": NEVER_STOPS, "block_size": 4, "early_stop": False}
    whole = decode(network, [3, 1, 4], 14, **settings)
    short = decode(network, [3, 1, 4], 14, limit=6, **settings)
    assert len(whole.response_ids) == 14
    assert short.response_ids == whole.response_ids[:6] and short.reveal_steps == whole.reveal_steps[:6]
    assert short.forwards == max(short.reveal_steps) + 1 <= whole.forwards


@pytest.mark.parametrize("decode", CANVAS_DECODERS)
def test_early_stop_fills_the_tail(decode: Callable[..., Answer]) -> None:
    network = Network(random_model())
    never = decode(network, [3, 1, 4], 30, conventions=NEVER_STOPS, block_size=4, early_stop=False)
    stops = replace(NEVER_STOPS, stop_ids=(never.response_ids[9],))
    answer = decode(network, [3, 1, 4], 30, conventions=stops, block_size=4, early_stop=True)
    stop = answer.response_ids.index(stops.stop_ids[0])
    assert len(answer.response_ids) == 30 and stop < 29
    assert set(answer.response_ids[stop + 1 :]) == {stops.eos_id}
    assert answer.forwards == max(answer.reveal_steps) + 1 and stops.mask_id not in answer.response_ids


@pytest.mark.parametrize("decode", [d2f.decode, fast_dllm_v2.decode, autoregressive.decode])
def test_growing_decoders_end_after_a_stop_token(decode: Callable[..., Answer]) -> None:
    network = Network(random_model())
    causal = decode is autoregressive.decode
    conventions = CAUSAL if causal else NEVER_STOPS
    settings = {} if causal else {"block_size": 4}
    never = decode(network, [3, 1, 4], 30, conventions=replace(conventions, stop_ids=()), **settings)
    stops = replace(conventions, stop_ids=(never.response_ids[4],))
    answer = decode(network, [3, 1, 4], 30, conventions=stops, **settings)
    assert stops.stop_ids[0] in answer.response_ids
    assert answer.response_ids == never.response_ids[: len(answer.response_ids)]
    assert len(answer.response_ids) < 30 and answer.forwards == max(answer.reveal_steps) + 1
    if causal:
        assert answer.response_ids.index(stops.stop_ids[0]) == answer.forwards - 1
