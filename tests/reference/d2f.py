"""D2F's pipelined decoding: a canvas that grows by blocks, block-causal attention (algorithms.md 6.2)."""

from __future__ import annotations

from .answer import Answer, Conventions, most_confident
from .canvas import Canvas
from .multiblock import Blocks
from .network import Network


def decode(
    network: Network,
    prompt_ids: list[int],
    size: int,
    *,
    conventions: Conventions,
    limit: int | None = None,
    block_size: int = 32,
    confidence_threshold: float = 0.9,
    block_add_threshold: float = 0.1,
    decoded_token_threshold: float = 0.95,
    early_stop: bool = False,
) -> Answer:
    canvas = Canvas(prompt_ids, size, conventions, limit)
    blocks = Blocks(canvas, block_size, created=0)
    store = network.store()
    prompt, cached = canvas.prompt, 0

    def block_of(position: int) -> int:
        return -1 if position < prompt else (position - prompt) // block_size

    def sees(query: int, key: int) -> bool:
        return block_of(key) <= block_of(query)

    while not canvas.finished():
        stop = canvas.first_stop()
        if stop is not None and not canvas.masked(0, blocks.end()):
            break
        blocks.advance(block_add_threshold, decoded_token_threshold, may_add=stop is None)
        finished = prompt  # absolute end of the finished spans, before this forward
        for block in range(blocks.created):
            if blocks.masked(block):
                break
            finished = prompt + blocks.bounds[block][1]

        first = cached - 1 if cached > 0 and conventions.shift else cached
        rows = network.forward(canvas.ids, first, prompt + blocks.end(), store, sees)
        canvas.forwards += 1
        cached = finished
        for block in range(blocks.created):
            guesses = canvas.guesses(rows, blocks.masked(block))
            chosen = [p for p, guess in guesses.items() if guess.confidence > confidence_threshold]
            if guesses and not chosen and block in blocks.activated:
                chosen = [most_confident(guesses)]
            for position in chosen:
                canvas.reveal(position, guesses[position].token)
        if early_stop:
            canvas.stop_early()
    return canvas.answer()
