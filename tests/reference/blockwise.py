"""The loop over sequential blocks that Fast-dLLM and dParallel share, with its caches (algorithms.md 4)."""

from __future__ import annotations

from collections.abc import Callable

from .answer import Answer, Guess
from .canvas import Canvas, cut
from .network import Network

Select = Callable[[dict[int, Guess]], list[int]]


def decode_blocks(
    network: Network,
    canvas: Canvas,
    *,
    block_size: int,
    cache: str,
    select: Select,
    early_stop: bool,
    repeat_finished: bool = False,
) -> Answer:
    """Decode block after block; `select` says which of the block's masked positions to reveal.

    `cache`: "none" computes the whole canvas every time. The others do so on entering a block; afterwards
    "prefix" computes from the block to the end of the canvas, "dual" only the block. `repeat_finished`: as published,
    these two look whether the block is finished only after the forward that follows the block's first one.
    """
    store = network.store()
    shift = int(canvas.conventions.shift)
    for start, end in cut(canvas.size, block_size):
        entering = True
        while not canvas.finished() and canvas.masked(start, end):
            first, last = 0, canvas.length
            if cache != "none" and not entering:
                first = canvas.prompt + start - shift
            if cache == "dual" and not entering:
                last = canvas.prompt + end
            rows = network.forward(canvas.ids, first, last, store)
            canvas.forwards += 1
            guesses = canvas.guesses(rows, canvas.masked(start, end))
            for position in select(guesses):
                canvas.reveal(position, guesses[position].token)
            if early_stop:
                canvas.stop_early()
            if repeat_finished and cache != "none" and entering and not canvas.masked(start, end):
                last = canvas.prompt + end if cache == "dual" else canvas.length
                network.forward(canvas.ids, canvas.prompt + start - shift, last, store)
                canvas.forwards += 1
            entering = False
    return canvas.answer()


def select_confident(guesses: dict[int, Guess], threshold: float, factor: float | None) -> list[int]:
    """Fast-dLLM's two rules: all at or above the threshold and the best, or the factor rule's longest prefix."""
    ranked = sorted(guesses, key=lambda position: (-guesses[position].confidence, position))
    if factor is None:
        return [p for rank, p in enumerate(ranked) if rank == 0 or guesses[p].confidence >= threshold]
    chosen = ranked[:1]
    for n in range(2, len(ranked) + 1):
        if guesses[ranked[n - 1]].confidence < 1 - factor / (n + 1):
            break
        chosen.append(ranked[n - 1])
    return chosen
