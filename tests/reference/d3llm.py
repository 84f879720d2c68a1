"""d3LLM's multi-block decoding with the delayed, refreshed cache (algorithms.md 9.3-9.5, decisions 15 and 20)."""

from __future__ import annotations

from .answer import Answer, Conventions
from .canvas import Canvas
from .multiblock import Blocks, select_certain
from .network import Network


def decode(
    network: Network,
    prompt_ids: list[int],
    size: int,
    *,
    conventions: Conventions,
    limit: int | None = None,
    block_size: int = 32,
    entropy_threshold: float = 0.45,
    block_add_threshold: float = 0.1,
    decoded_token_threshold: float = 0.95,
    cache_delay: int = 2,
    refresh_interval: int = 10000,
    suffix: str = "recompute",
    early_stop: bool = True,
) -> Answer:
    """`suffix`: recompute, cached or none, for the masks behind the active blocks."""
    canvas = Canvas(prompt_ids, size, conventions, limit)
    blocks = Blocks(canvas, block_size, created=1)
    store = network.store()
    cached = 0
    stamps = {0: 0}  # span -> forward before which it was first seen finished; span 0 is the prompt
    while not canvas.finished():
        n = canvas.forwards + 1
        blocks.advance(block_add_threshold, decoded_token_threshold, may_add=True)
        active_end = blocks.end()
        stop = canvas.first_stop()
        if early_stop and stop is not None:
            active_end = blocks.end_of_block_at(stop)

        spans = [(0, canvas.prompt)]
        spans += [(canvas.prompt + start, canvas.prompt + end) for start, end in blocks.bounds[: blocks.created]]
        frozen, waiting = cached, False
        for span, (_, span_end) in enumerate(spans):
            if span_end <= cached:
                continue
            if blocks.masked(span - 1):
                break
            stamps.setdefault(span, n)
            if n - stamps[span] >= cache_delay:
                frozen = span_end
            else:
                waiting = True
                if not conventions.dream_rules:
                    break

        newly_frozen = frozen > cached
        # Interval 1 means every forward, also one that freezes.
        interval_due = refresh_interval == 1 or (n % refresh_interval == 0 and not newly_frozen)
        refresh = interval_due or (waiting and not newly_frozen)
        first = 0 if refresh else cached
        last = canvas.length if suffix == "recompute" else canvas.prompt + active_end
        if suffix == "cached" and (n == 1 or interval_due):
            first, last = 0, canvas.length
        keys_end = last if suffix == "none" else canvas.length
        if first > 0 and conventions.shift:
            first -= 1

        def sees(query: int, key: int, end: int = keys_end) -> bool:
            return key < end

        rows = network.forward(canvas.ids, first, last, store, sees)
        canvas.forwards += 1
        cached = frozen
        guesses = canvas.guesses(rows, canvas.masked(0, active_end))
        for position in select_certain(canvas, blocks, guesses, entropy_threshold):
            canvas.reveal(position, guesses[position].token)
        if early_stop and canvas.first_stop() is not None:
            canvas.stop_early()
            blocks.created = len(blocks.bounds)
    return canvas.answer()
