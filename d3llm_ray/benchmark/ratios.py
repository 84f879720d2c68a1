"""What one cell gains over another. Rounds are paired: a ratio is the median over rounds, each of two neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from d3llm_ray.benchmark.rows import BenchmarkRow, spread


@dataclass(frozen=True)
class Ratio:
    """`value` is a median, with `low` and `high` beside it: the extremes of the rounds, or the quartiles of steps."""

    name: str
    what: str
    value: float
    low: float
    high: float


def decoding_ratios(rows: Sequence[BenchmarkRow], full_length: bool) -> list[Ratio]:
    """Every ratio that the rows allow.

    overhead: time of an engine step over the bare model's on the same windows, for every row.
    cache: `d3llm` over `d3llm-nocache`, tokens/s at the same batch size and canvas.
    batching: every batch size over the smallest, tokens/s of the same decoder and canvas.
    canvas: a canvas of twice the length over the one it doubles, tokens/s of the same decoder and batch size. Not
        with `full_length`: it asks what a longer canvas costs an answer that does not use it.
    """
    spoken = [row for row in rows if row.tokens]  # no speed can be set against that of empty answers
    gains = [*_overheads(rows), *_cache(spoken), *_batching(spoken)]
    return gains if full_length else [*gains, *_canvas(spoken)]


def _overheads(rows: Sequence[BenchmarkRow]) -> Iterator[Ratio]:
    for row in rows:
        what = f"{_where(row)}: engine / bare model"
        yield Ratio("overhead", what, row.overhead, row.overhead_low, row.overhead_high)


def _cache(rows: Sequence[BenchmarkRow]) -> Iterator[Ratio]:
    for plain in rows:
        for cached in rows:
            same = (plain.batch_size, plain.max_tokens) == (cached.batch_size, cached.max_tokens)
            if (plain.decoder, cached.decoder) == ("d3llm-nocache", "d3llm") and same:
                yield _speedup("cache", f"{_where(cached)}: tokens/s / those of d3llm-nocache", cached, plain)


def _batching(rows: Sequence[BenchmarkRow]) -> Iterator[Ratio]:
    smallest = min((row.batch_size for row in rows), default=0)
    for large in rows:
        for small in rows:
            if small.batch_size == smallest < large.batch_size and _alike(small, large, "max_tokens"):
                yield _speedup("batching", f"{_where(large)}: tokens/s / those of batch {smallest}", large, small)


def _canvas(rows: Sequence[BenchmarkRow]) -> Iterator[Ratio]:
    for long in rows:
        for short in rows:
            if long.max_tokens == 2 * short.max_tokens and _alike(short, long, "batch_size"):
                answers = f"answers of {short.tokens / short.count:.1f} and {long.tokens / long.count:.1f} tokens"
                what = f"{_where(long)}: tokens/s / those of canvas {short.max_tokens} ({answers})"
                yield _speedup("canvas", what, long, short)


def _alike(left: BenchmarkRow, right: BenchmarkRow, field: str) -> bool:
    return left.settings == right.settings and getattr(left, field) == getattr(right, field)


def _where(row: BenchmarkRow) -> str:
    return f"{row.label}, batch {row.batch_size}, canvas {row.max_tokens}"


def _speedup(name: str, what: str, upper: BenchmarkRow, lower: BenchmarkRow) -> Ratio:
    pairs = zip(upper.rounds, lower.rounds, strict=True)
    return Ratio(name, what, *spread([over.tps / under.tps for over, under in pairs]))
