"""LLaDA's decoding: a linear quota per step in each block (algorithms.md 3.1)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .answer import Answer, Conventions, highest
from .canvas import Canvas, cut
from .guidance import full_forward
from .network import Network


def decode(
    network: Network,
    prompt_ids: list[int],
    size: int,
    *,
    conventions: Conventions,
    limit: int | None = None,
    block_size: int = 32,
    steps: int | None = None,
    remasking: str = "low_confidence",
    cfg_scale: float = 0.0,
    uniform: Callable[[int, np.ndarray, int], np.ndarray] | None = None,
    seed: int = 0,
    early_stop: bool = True,
) -> Answer:
    """`remasking`: low_confidence, or random, which ranks by `uniform(seed, positions, forward)`, forward from 1."""
    canvas = Canvas(prompt_ids, size, conventions, limit)
    steps = size if steps is None else min(steps, size)
    for start, end in cut(size, block_size):
        block_steps = max(1, steps * end // size - steps * start // size)
        each, extra = divmod(end - start, block_steps)
        step = 0
        while not canvas.finished() and canvas.masked(start, end):
            rows = full_forward(network, canvas, cfg_scale)
            masked = canvas.masked(start, end)
            guesses = canvas.guesses(rows, masked)
            if remasking == "low_confidence":
                scores = {position: guess.confidence for position, guess in guesses.items()}
            else:
                assert remasking == "random" and uniform is not None
                draws = uniform(seed, np.array(masked), canvas.forwards)
                scores = dict(zip(masked, draws.tolist(), strict=True))
            quota = max(1, each + 1 if step < extra else each)
            for position in highest(scores, quota):
                canvas.reveal(position, guesses[position].token)
            if early_stop:
                canvas.stop_early()
            step += 1
    return canvas.answer()
