"""Dream's decoding: timesteps from 1 to eps decide how much each step reveals (algorithms.md 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .answer import Answer, Conventions, Guess, highest
from .canvas import Canvas, cut
from .guidance import full_forward
from .network import Network

EPS = 1e-3

SCORES: dict[str, Callable[[Guess], float]] = {
    "maskgit_plus": lambda guess: guess.confidence,
    "topk_margin": lambda guess: guess.gap,
    "entropy": lambda guess: -guess.entropy,
}


def decode(
    network: Network,
    prompt_ids: list[int],
    size: int,
    *,
    conventions: Conventions,
    limit: int | None = None,
    block_size: int | None = None,
    steps: int | None = None,
    remasking: str = "entropy",
    cfg_scale: float = 0.0,
    uniform: Callable[[int, np.ndarray, int], np.ndarray] | None = None,
    seed: int = 0,
    early_stop: bool = True,
) -> Answer:
    """`remasking`: origin (needs `uniform(seed, positions, step)`, steps from 1), or a name in `SCORES`."""
    canvas = Canvas(prompt_ids, size, conventions, limit)
    steps = size if steps is None else min(steps, size)
    steps_before = 0
    for start, end in cut(size, size if block_size is None else block_size):
        block_steps = max(1, steps * end // size - steps * start // size)
        times = np.linspace(1, EPS, block_steps + 1)
        for i in range(block_steps):
            masked = canvas.masked(start, end)
            if canvas.finished() or not masked:
                break
            is_last = i == block_steps - 1
            probability = 1.0 if is_last else float(1 - times[i + 1] / times[i])
            quota = len(masked) if is_last else int(len(masked) * probability)
            drawn: list[int] = []
            if remasking == "origin":
                assert uniform is not None
                draws = uniform(seed, np.array(masked), steps_before + i + 1)
                drawn = [position for position, draw in zip(masked, draws, strict=True) if draw < probability]
                quota = len(drawn)
            if quota == 0:
                continue  # no forward, so none is counted
            guesses = canvas.guesses(full_forward(network, canvas, cfg_scale), masked)
            if remasking != "origin":
                score = SCORES[remasking]
                drawn = highest({position: score(guess) for position, guess in guesses.items()}, quota)
            for position in drawn:
                canvas.reveal(position, guesses[position].token)
            if early_stop:
                canvas.stop_early()
        steps_before += block_steps
    return canvas.answer()
