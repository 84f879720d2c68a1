"""Fast-dLLM with the dual cache: all keys outside the block are frozen while it is decoded (algorithms.md 4)."""

from __future__ import annotations

from .answer import Answer, Conventions
from .blockwise import decode_blocks, select_confident
from .canvas import Canvas
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
    factor: float | None = None,
    early_stop: bool = True,
    repeat_finished: bool = False,
) -> Answer:
    return decode_blocks(
        network,
        Canvas(prompt_ids, size, conventions, limit),
        block_size=block_size,
        cache="dual",
        select=lambda guesses: select_confident(guesses, confidence_threshold, factor),
        early_stop=early_stop,
        repeat_finished=repeat_finished,
    )
