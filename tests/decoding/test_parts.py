"""Schedules, selections and caches on hand-worked cases, without a model."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d3llm_ray.decoding import PRESETS, decoder
from d3llm_ray.decoding.batch import Grouping, Span, grouped
from d3llm_ray.decoding.caches import DelayedCache, NoCache
from d3llm_ray.decoding.canvas import Canvas
from d3llm_ray.decoding.contracts import Opening, Selection, Window
from d3llm_ray.decoding.remasking import TopK
from d3llm_ray.decoding.rules import FamilyRules
from d3llm_ray.decoding.schedules import MultiBlock, SequentialBlocks
from d3llm_ray.decoding.selections import (
    BlockwiseConfidence,
    ConfidenceThreshold,
    EntropyThreshold,
    SubBlockConfidence,
)
from d3llm_ray.decoding.statistics import TokenStatistics
from d3llm_ray.errors import InputError

LLADA = FamilyRules(False, True, True, "low_confidence", False)
DREAM = FamilyRules(True, False, False, "entropy", False)  # without the shift: windows stay easy to read
MASK = 99


def _canvas(prompt: int = 5, size: int = 12, block: int = 4, **options) -> Canvas:
    return Canvas(list(range(prompt)), size, block, MASK, **options)


def _reveal(canvas: Canvas, *positions: int, token: int = 7) -> None:
    none = np.zeros(len(positions), dtype=np.float32)
    canvas.commit(np.array(positions), np.full(len(positions), token), none, none)


def _statistics(confidence: np.ndarray | None = None, entropy: np.ndarray | None = None, **others) -> TokenStatistics:
    """Figures of a forward; what is not given must not be looked at."""
    logprob = None if confidence is None else np.log(confidence)
    given = {"confidence": confidence, "entropy": entropy, "logprob": logprob, **others}
    names = TokenStatistics.__dataclass_fields__
    return TokenStatistics(**{name: given.get(name) for name in names})


def test_a_canvas_that_is_no_multiple_has_a_shorter_last_block() -> None:
    canvas = _canvas(size=10)
    assert canvas.ends == [4, 8, 10] and canvas.mask_counts == [4, 4, 2]
    canvas.forwards = 3
    _reveal(canvas, 0, 1, 9)
    assert canvas.mask_counts == [2, 4, 1] and canvas.committed == 2
    assert canvas.reveal_step[[0, 1, 9]].tolist() == [2, 2, 2]


def test_sequential_blocks_open_one_after_another() -> None:
    canvas, schedule = _canvas(), SequentialBlocks()
    opening = schedule.open(canvas)
    assert opening.eligible.tolist() == [0, 1, 2, 3] and (opening.start, opening.end) == (0, 4)
    _reveal(canvas, 0, 1, 2, 3)
    _reveal(canvas, 5)
    opening = schedule.open(canvas)
    assert opening.eligible.tolist() == [4, 6, 7] and (opening.start, opening.end) == (4, 8)


def test_multi_block_adds_one_block_a_forward_at_the_threshold() -> None:
    canvas, schedule = _canvas(), MultiBlock(block_add_threshold=0.5, decoded_token_threshold=0.75)
    assert schedule.open(canvas).end == 4 and canvas.activated == [True, False, False]
    _reveal(canvas, 0)
    assert schedule.open(canvas).end == 4  # 25 % decoded
    _reveal(canvas, 1)
    opening = schedule.open(canvas)
    assert opening.end == 8 and opening.eligible.tolist() == [2, 3, 4, 5, 6, 7]
    assert canvas.activated == [True, False, False]  # half-decoded predecessor: semi-activated
    _reveal(canvas, 2, 4, 5)
    assert schedule.open(canvas).end == 12
    assert canvas.activated == [True, True, False]


def test_top_k_spreads_the_remainder_over_the_first_steps() -> None:
    """10 masks in 4 steps: 3, 3, 2, 2 (LLaDA's get_num_transfer_tokens)."""
    canvas, rule, counts = _canvas(size=10, block=10), TopK(steps=4), []
    confidence = np.linspace(0.9, 0.1, 10, dtype=np.float32)
    for _ in range(4):
        opening = SequentialBlocks().open(canvas)
        revealed, forced = rule.select(canvas, opening, _statistics(confidence[opening.eligible]), LLADA, 0)
        assert forced is None
        counts.append(opening.eligible[revealed].tolist())
        _reveal(canvas, *opening.eligible[revealed])
    assert counts == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (TopK(steps=4), [2]),
        (SubBlockConfidence(1.0), [2]),
        (BlockwiseConfidence(1.0), [2]),
        (ConfidenceThreshold(1.0), [0, 1, 2, 3]),
    ],
)
def test_near_certain_tokens_are_ranked_by_what_is_left(selection: Selection, expected: list[int]) -> None:
    canvas, ones = _canvas(size=4), np.ones(4, dtype=np.float32)
    opening = SequentialBlocks().open(canvas)
    figures = _statistics(ones, logprob=np.array([-3e-9, -2e-9, -1e-12, -1e-9], dtype=np.float32))
    assert np.flatnonzero(selection.select(canvas, opening, figures, LLADA, 0).revealed).tolist() == expected


def test_stop_tokens_are_deferred_until_nothing_else_is_left() -> None:
    canvas, order = _canvas(size=4, stop_ids=[9]), []
    tokens = np.array([9, 7, 9, 7])
    for _ in range(4):
        opening = SequentialBlocks().open(canvas)
        confidence = np.array([0.9, 0.2, 0.8, 0.3], dtype=np.float32)[opening.eligible]
        figures = _statistics(confidence, sampled=tokens[opening.eligible])
        revealed, _ = TopK(defer_stops=True).select(canvas, opening, figures, LLADA, 0)
        order += opening.eligible[revealed].tolist()
        _reveal(canvas, *opening.eligible[revealed])
    assert order == [3, 1, 0, 2]


def test_entropy_threshold_by_family() -> None:
    canvas = _canvas()
    canvas.activated[0] = True
    opening = Opening(np.arange(8), 0, 8)
    figures = _statistics(entropy=np.array([2.0, 0.5, 0.9, 1.5, 0.1, 0.5, 3.0, 0.2], dtype=np.float32))
    reveal = lambda h, rules: EntropyThreshold(h).select(canvas, opening, figures, rules, 0)  # noqa: E731
    assert np.flatnonzero(reveal(0.5, LLADA)[0]).tolist() == [1, 4, 5, 7]  # H <= threshold
    revealed, forced = reveal(0.5, DREAM)  # H < threshold, and the first block must advance
    assert np.flatnonzero(revealed).tolist() == [1, 4, 7] and np.flatnonzero(forced).tolist() == [1]
    revealed, forced = reveal(0.0, LLADA)  # the best of all, and the best of the first block
    assert np.flatnonzero(revealed).tolist() == [1, 4] and np.flatnonzero(forced).tolist() == [1]


def _windows(
    cache: DelayedCache, rules: FamilyRules, reveals: list[tuple[int, ...]], add: float = 0.0
) -> list[tuple[Window, int]]:
    """Drive a cache over a 5-token prompt and 3 blocks of 4; `reveals[i]` is what forward i + 1 reveals."""
    canvas, schedule, seen = _canvas(), MultiBlock(add, 0.0), []
    for positions in reveals:
        canvas.forwards += 1
        seen.append((cache.window(canvas, schedule.open(canvas), rules), canvas.cached))
        _reveal(canvas, *positions)
    return seen


def test_no_cache_computes_everything() -> None:
    assert NoCache().window(_canvas(), Opening(np.arange(4), 0, 4), LLADA) == Window(0, 17, 17)


def test_delay_one_freezes_the_prompt_in_the_first_forward() -> None:
    """Delay 1: prompt frozen by forward 1, a block seen finished in forward n is frozen by forward n + 1."""
    seen = _windows(DelayedCache(cache_delay=1), LLADA, [(0, 1, 2, 3), (4,), (5, 6, 7), (8,), (9,)])
    full = Window(0, 17, 17)
    assert [window for window, _ in seen] == [full, full, Window(5, 17, 17), full, Window(9, 17, 17)]
    assert [cached for _, cached in seen] == [5, 5, 9, 9, 13]


def test_stabilising_is_serial_for_llada_and_overlaps_for_dream() -> None:
    """Blocks 1 and 2 finish in the same forward, delay 2."""
    reveals = [(0,), (1, 2, 3, 4, 5, 6, 7), (8,), (9,), (10,), (11,)]
    serial = [cached for _, cached in _windows(DelayedCache(cache_delay=2), LLADA, reveals)]
    overlapping = [cached for _, cached in _windows(DelayedCache(cache_delay=2), DREAM, reveals)]
    assert serial == [0, 5, 5, 5, 9, 9] and overlapping == [0, 5, 5, 5, 13, 13]


def test_refresh_recomputes_everything_but_keeps_what_is_frozen() -> None:
    seen = _windows(DelayedCache(refresh_interval=3), LLADA, [(0,), (1,), (2,), (4,), (5,), (6,)])
    full, short = Window(0, 17, 17), Window(5, 17, 17)
    assert [window for window, _ in seen] == [full, short, full, short, short, full]
    assert {cached for _, cached in seen} == {5}


@pytest.mark.parametrize(("suffix", "full", "key_length"), [("recompute", 17, 17), ("cached", 17, 17), ("none", 9, 9)])
def test_suffix_modes_bound_the_window(suffix: str, full: int, key_length: int) -> None:
    """Block 1 alone is open: "cached" and "none" compute up to its end (9), but attend to all or to 9 keys."""
    (first, _), (second, _) = _windows(DelayedCache(suffix=suffix), LLADA, [(0,), (1,)], add=1.0)
    assert first == Window(0, full, full)
    assert second == Window(5, 17 if suffix == "recompute" else 9, key_length)


def test_a_cached_suffix_is_computed_at_first_and_by_interval_only() -> None:
    """Block 1 finishes in forward 1: forward 2 starts at 0 while it stabilises, but leaves the suffix out."""
    cache = DelayedCache(suffix="cached", refresh_interval=4)
    seen = [window for window, _ in _windows(cache, LLADA, [(0, 1, 2, 3), (4,), (5,), (6,), (7,)], add=0.5)]
    assert seen == [Window(0, 17, 17), Window(0, 13, 17), Window(5, 13, 17), Window(0, 17, 17), Window(9, 17, 17)]


def test_early_stop_fills_the_tail_and_may_move_left() -> None:
    canvas = _canvas(stop_ids=[1, 2])
    canvas.forwards = 4
    _reveal(canvas, 6, token=1)
    _reveal(canvas, 9)
    canvas.fill_after_stop(1)
    assert canvas.stop == 6 and canvas.tokens[5 + 7 :].tolist() == [1] * 5 and not canvas.masked[6:].any()
    assert canvas.mask_counts == [4, 2, 0] and canvas.created == 3
    assert canvas.reveal_step[7] == 3
    # What lies behind the stop token's block is no longer worth computing.
    assert MultiBlock().open(canvas).end == 8
    _reveal(canvas, 2, token=2)
    canvas.fill_after_stop(1)
    assert canvas.stop == 2 and canvas.tokens[5 + 2 :].tolist() == [2] + [1] * 9 and canvas.committed == 0


def test_aligned_blocks_end_at_absolute_multiples() -> None:
    canvas = _canvas(prompt=6, size=10, aligned=True)
    assert canvas.starts == [0, 2, 6] and canvas.ends == [2, 6, 10]
    canvas = _canvas(prompt=8, size=8, aligned=True)
    assert canvas.starts == [0, 4]


def test_presets_and_overrides() -> None:
    assert set(PRESETS) >= {"vanilla", "dparallel", "d3llm-nocache", "d3llm"}
    chosen = decoder("d3llm", entropy_threshold=1, refresh_interval=8, suffix="cached", block_size=16)
    assert chosen.settings() == {
        "block_size": 16,
        "early_stop": True,
        "block_add_threshold": 0.1,
        "decoded_token_threshold": 0.95,
        "entropy_threshold": 1,
        "cache_delay": 1,
        "refresh_interval": 8,
        "suffix": "cached",
    }
    assert decoder("d3llm").override(**chosen.settings()) == chosen


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("d4llm", {}, "decoder.*accepted: autoregressive, d2f, d3llm, d3llm-nocache, dparallel"),
        ("vanilla", {"entropy_threshold": 0.4}, "entropy_threshold.*accepted: alg_temp, block_size, cfg_scale"),
        ("autoregressive", {"block_size": 4}, "block_size.*accepted: none"),
        ("vanilla", {"remasking": "low"}, "remasking.*accepted: entropy, low_confidence, maskgit_plus"),
        ("vanilla", {"cfg_scale": -1.0}, "cfg_scale"),
        ("vanilla", {"eps": 0.0}, "eps"),
        ("fast-dllm-dual", {"factor": 0}, "factor"),
        ("fast-dllm-dual", {"confidence_threshold": 1.5}, "confidence_threshold"),
        ("fast-dllm-prefix", {"cache": "half"}, "cache.*accepted: dual, none, prefix"),
        ("fast-dllm-v2", {"sub_block_size": 0}, "sub_block_size"),
        ("fast-dllm-v2", {"block_size": 12}, "block_size.*multiple of sub_block_size 8"),
        ("d3llm", {"block_size": True}, "block_size"),
        ("d3llm", {"suffix": "half"}, "suffix.*accepted: cached, none, recompute"),
        ("d3llm", {"entropy_threshold": -1.0}, "entropy_threshold"),
        ("d3llm", {"entropy_threshold": float("nan")}, "entropy_threshold"),
        ("d3llm", {"entropy_threshold": "much"}, "entropy_threshold"),
        ("d3llm", {"block_add_threshold": 1.5}, "block_add_threshold"),
        ("d3llm", {"refresh_interval": 0}, "refresh_interval"),
        ("d3llm", {"cache_delay": 1.5}, "cache_delay"),
        ("d3llm", {"block_size": 0}, "block_size"),
        ("d3llm", {"early_stop": "yes"}, "early_stop"),
        ("vanilla", {"steps": 0}, "steps"),
    ],
)
def test_bad_settings_are_named(name: str, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decoder(name, **settings)


@given(st.integers(0, 30), st.integers(1, 60), st.integers(1, 9), st.booleans(), st.randoms(use_true_random=False))
def test_block_states_equal_a_literal_count(
    prompt: int, size: int, block: int, aligned: bool, rng: random.Random
) -> None:
    """Blocks of a canvas, aligned ones to absolute multiples, whose masks are counted anew after every reveal."""
    canvas = _canvas(prompt, size, block, aligned=aligned)
    offset = prompt if aligned else 0
    of = [(offset + position) // block for position in range(size)]
    blocks = sorted(set(of))
    assert [canvas.block_of(position) for position in range(size)] == [blocks.index(index) for index in of]
    positions = list(range(size))
    rng.shuffle(positions)
    while positions:
        revealed = [positions.pop() for _ in range(min(len(positions), rng.randint(1, 4)))]
        _reveal(canvas, *revealed)
        counts = [sum(of[position] == index for position in positions) for index in blocks]
        assert canvas.mask_counts == counts
        still = [number for number, count in enumerate(counts) if count]
        assert canvas.first_open_block() == (still[0] if still else len(blocks))
        assert canvas.committed == min(positions, default=size)
        sizes = [of.count(index) for index in blocks]
        assert [canvas.progress(n) for n in range(len(blocks))] == pytest.approx(
            [1 - count / whole for count, whole in zip(counts, sizes, strict=True)]
        )
    assert canvas.progress(-1) == 1.0  # the prompt


def test_groups_are_bounded_and_share_what_can_be_shared() -> None:
    """On a CPU similar windows of at most 512 tokens; on CUDA whatever fits; never with and without a cache."""
    lengths = [10, 400, 12, 200, 11, 390, 16]
    spans = [
        Span(row, np.zeros(length), Window(0, length, length), None if row == 6 else row, np.arange(1))
        for row, length in enumerate(lengths)
    ]
    cpu = [[len(span.tokens) for span in group] for group in grouped(spans, Grouping.on(torch.device("cpu")))]
    assert cpu == [[10, 11, 12], [200], [390], [400], [16]]  # 390 + 400 are more than 512 together
    cuda = [[span.row for span in group] for group in grouped(spans, Grouping.on(torch.device("cuda")))]
    assert cuda == [[0, 4, 2, 3, 5, 1], [6]]
    assert [len(group) for group in grouped(spans, Grouping(800))] == [5, 1, 1]
