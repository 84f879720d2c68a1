"""Ratios against values worked out by hand."""

from __future__ import annotations

import pytest

from d3llm_ray.benchmark.profile import PHASES
from d3llm_ray.benchmark.ratios import Ratio, decoding_ratios
from d3llm_ray.benchmark.rows import BenchmarkRow, Round


def row(decoder: str, batch_size: int, max_tokens: int, rounds: list[Round], **settings: object) -> BenchmarkRow:
    speeds = ("tpf", "tps", "tps_low", "tps_high", "seconds", "ms")
    limits = ("window", "flops", "bytes", "compute_bound", "roofline_ms", "roofline_tps", "roofline_percent")
    figures = dict.fromkeys(speeds + limits, 1.0)
    return BenchmarkRow(
        model="m",
        decoder=decoder,
        task="t",
        settings={"decoder": decoder, **settings},
        batch_size=batch_size,
        max_tokens=max_tokens,
        prompt_tokens=8.0,
        count=4,
        tokens=rounds[0].tokens,
        forwards=10,
        steps=10,
        phases_ms=dict.fromkeys(PHASES, 1.0),
        overhead=1.2,
        overhead_low=1.1,
        overhead_high=1.3,
        rounds=tuple(rounds),
        **figures,
    )


def rounds(tokens: int, *seconds: float) -> list[Round]:
    return [Round(tokens, value) for value in seconds]


def named(found: list[Ratio], name: str) -> list[Ratio]:
    return [ratio for ratio in found if ratio.name == name]


def test_ratios_pair_the_rounds() -> None:
    # The machine was half as fast in the second round: the paired ratio is 3 in every round, as it should be.
    rows = [
        row("d3llm-nocache", 8, 64, rounds(60, 6.0, 12.0, 6.0)),
        row("d3llm", 8, 64, rounds(80, 8 / 3, 16 / 3, 8 / 3), suffix="cached"),
    ]
    (cache,) = named(decoding_ratios(rows, full_length=False), "cache")
    assert (cache.value, cache.low, cache.high) == pytest.approx((3, 3, 3))
    assert "d3llm (cached), batch 8, canvas 64" in cache.what


def test_batching_and_canvas() -> None:
    rows = [
        row("d3llm", 1, 64, rounds(80, 8.0, 8.0, 8.0), suffix="cached"),
        row("d3llm", 8, 64, rounds(80, 4.0, 2.0, 1.0), suffix="cached"),
        row("d3llm", 1, 128, rounds(84, 10.0, 8.4, 9.0), suffix="cached"),
        row("d3llm", 8, 64, rounds(80, 1.0, 1.0, 1.0), suffix="none"),
        row("d3llm", 1, 256, rounds(0, 1.0, 1.0, 1.0), suffix="cached"),
    ]
    found = decoding_ratios(rows, full_length=False)
    (batching,) = named(found, "batching")
    assert (batching.value, batching.low, batching.high) == (4, 2, 8)
    (canvas,) = named(found, "canvas")  # none over the empty answers of canvas 256
    assert (canvas.value, canvas.low, canvas.high) == pytest.approx((8.4 / 9, 0.84, 1))
    assert "20.0 and 21.0 tokens" in canvas.what
    assert not named(found, "cache")
    assert [(one.value, one.low, one.high) for one in named(found, "overhead")] == [(1.2, 1.1, 1.3)] * len(rows)
    assert not named(decoding_ratios(rows, full_length=True), "canvas")
