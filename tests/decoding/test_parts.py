"""Schedules, selections and caches on hand-worked cases, without a model."""

from __future__ import annotations

import numpy as np
import pytest

from d3llm_ray.decoding import PRESETS, decoder
from d3llm_ray.decoding.caches import DelayedCache, NoCache, Window
from d3llm_ray.decoding.canvas import Canvas
from d3llm_ray.decoding.rules import FamilyRules
from d3llm_ray.decoding.schedules import MultiBlock, SequentialBlocks
from d3llm_ray.decoding.selections import EntropyThreshold, TopK
from d3llm_ray.errors import InputError

LLADA = FamilyRules(False, True, True, "confidence")
DREAM = FamilyRules(True, False, False, "entropy")
MASK = 99


def _canvas(prompt: int = 5, size: int = 12, block: int = 4) -> Canvas:
    return Canvas(list(range(prompt)), size, block, MASK)


def _reveal(canvas: Canvas, *positions: int, token: int = 7) -> None:
    count = len(positions)
    canvas.commit(np.array(positions), np.full(count, token), np.zeros(count, dtype=np.float32))


def test_a_canvas_that_is_no_multiple_has_a_shorter_last_block() -> None:
    canvas = _canvas(size=10)
    assert canvas.ends.tolist() == [4, 8, 10] and canvas.mask_counts.tolist() == [4, 4, 2]
    canvas.forwards = 3
    _reveal(canvas, 0, 1, 9)
    assert canvas.mask_counts.tolist() == [2, 4, 1] and canvas.committed == 2
    assert canvas.reveal_step[[0, 1, 9]].tolist() == [2, 2, 2]


def test_sequential_blocks_open_one_after_another() -> None:
    canvas, schedule = _canvas(), SequentialBlocks()
    eligible, end = schedule.open(canvas)
    assert eligible.tolist() == [0, 1, 2, 3] and end == 4
    _reveal(canvas, 0, 1, 2, 3)
    _reveal(canvas, 5)
    eligible, end = schedule.open(canvas)
    assert eligible.tolist() == [4, 6, 7] and end == 8


def test_multi_block_adds_one_block_a_forward_at_the_threshold() -> None:
    canvas, schedule = _canvas(), MultiBlock(block_add_threshold=0.5, decoded_token_threshold=0.75)
    eligible, end = schedule.open(canvas)
    assert end == 4 and canvas.activated.tolist() == [True, False, False]
    _reveal(canvas, 0)
    assert schedule.open(canvas)[1] == 4  # 25 % decoded
    _reveal(canvas, 1)
    eligible, end = schedule.open(canvas)
    assert end == 8 and eligible.tolist() == [2, 3, 4, 5, 6, 7]
    assert canvas.activated.tolist() == [True, False, False]  # half-decoded predecessor: semi-activated
    _reveal(canvas, 2, 4, 5)
    assert schedule.open(canvas)[1] == 12
    assert canvas.activated.tolist() == [True, True, False]


def test_top_k_spreads_the_remainder_over_the_first_steps() -> None:
    """10 masks in 4 steps: 3, 3, 2, 2 (LLaDA's get_num_transfer_tokens)."""
    canvas, rule, counts = _canvas(size=10, block=10), TopK(steps=4), []
    confidence = np.linspace(0.9, 0.1, 10, dtype=np.float32)
    for _ in range(4):
        eligible, _ = SequentialBlocks().open(canvas)
        revealed, forced = rule.select(canvas, eligible, 1 - confidence[eligible], confidence[eligible], LLADA)
        assert not forced.any()
        counts.append(eligible[revealed].tolist())
        _reveal(canvas, *eligible[revealed])
    assert counts == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]


def test_entropy_threshold_by_family() -> None:
    canvas = _canvas()
    canvas.activated[0] = True
    eligible = np.arange(8)
    entropy = np.array([2.0, 0.5, 0.9, 1.5, 0.1, 0.5, 3.0, 0.2], dtype=np.float32)
    none = np.zeros(8, dtype=np.float32)
    reveal = lambda h, rules: EntropyThreshold(h).select(canvas, eligible, entropy, none, rules)  # noqa: E731
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
        _, end = schedule.open(canvas)
        seen.append((cache.window(canvas, end, rules), canvas.cached))
        _reveal(canvas, *positions)
    return seen


def test_no_cache_computes_everything() -> None:
    assert NoCache().window(_canvas(), 4, LLADA) == Window(0, 17, 17)


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


def test_early_stop_fills_the_tail_and_may_move_left() -> None:
    canvas = _canvas()
    canvas.forwards = 4
    _reveal(canvas, 6, token=1)
    _reveal(canvas, 9)
    canvas.fill_after_stop([1, 2], 1)
    assert canvas.stop == 6 and canvas.tokens[5 + 7 :].tolist() == [1] * 5 and not canvas.masked[6:].any()
    assert canvas.mask_counts.tolist() == [4, 2, 0] and canvas.created == 3
    assert canvas.reveal_step[7] == 3
    _reveal(canvas, 2, token=2)
    canvas.fill_after_stop([1, 2], 1)
    assert canvas.stop == 2 and canvas.tokens[5 + 2 :].tolist() == [2] + [1] * 9 and canvas.committed == 0


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
        ("d4llm", {}, "decoder.*accepted: d3llm, d3llm-nocache, dparallel, vanilla"),
        ("vanilla", {"entropy_threshold": 0.4}, "entropy_threshold.*accepted: block_size, early_stop, steps"),
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
