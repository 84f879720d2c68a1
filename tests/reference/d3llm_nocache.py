"""d3LLM's multi-block decoding without a cache (algorithms.md 9.1, 9.2, 9.5)."""

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
    early_stop: bool = True,
) -> Answer:
    canvas = Canvas(prompt_ids, size, conventions, limit)
    blocks = Blocks(canvas, block_size, created=1)
    while not canvas.finished():
        blocks.advance(block_add_threshold, decoded_token_threshold, may_add=True)
        rows = network.forward(canvas.ids, 0, canvas.length, network.store())
        canvas.forwards += 1
        guesses = canvas.guesses(rows, canvas.masked(0, blocks.end()))
        for position in select_certain(canvas, blocks, guesses, entropy_threshold):
            canvas.reveal(position, guesses[position].token)
        if early_stop and canvas.first_stop() is not None:
            canvas.stop_early()
            blocks.created = len(blocks.bounds)
    return canvas.answer()
