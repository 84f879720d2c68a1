"""Schedules: which blocks may be decoded now."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from d3llm_ray.decoding.canvas import Canvas, IntArray
from d3llm_ray.errors import require


@dataclass(frozen=True)
class SequentialBlocks:
    """One block after another, left to right (LLaDA's semi-autoregressive decoding)."""

    def open(self, canvas: Canvas) -> tuple[IntArray, int]:
        """Advance the block states before a forward.

        Returns the eligible response positions and the end of the active region (response position).
        """
        block = canvas.first_open_block()
        canvas.created = max(canvas.created, block + 1)
        canvas.activated[block] = True
        start, end = int(canvas.starts[block]), int(canvas.ends[block])
        return start + np.flatnonzero(canvas.masked[start:end]), end


@dataclass(frozen=True)
class MultiBlock:
    """Several blocks at once (d3LLM section 4.1; block states as in D2F, arXiv:2508.09192).

    A block is added when the last one's decoded fraction reaches `block_add_threshold`, and fully activated
    when its predecessor's reaches `decoded_token_threshold` (the prompt counts as fully decoded).
    """

    block_add_threshold: float = 0.1
    decoded_token_threshold: float = 0.95

    def __post_init__(self) -> None:
        for field in ("block_add_threshold", "decoded_token_threshold"):
            value = getattr(self, field)
            require(0.0 <= value <= 1.0, field, value, "a fraction from 0 to 1")

    def open(self, canvas: Canvas) -> tuple[IntArray, int]:
        """As `SequentialBlocks.open`."""
        progress = canvas.progress
        last = canvas.created - 1
        may_add = canvas.created < canvas.num_blocks and canvas.stop is None
        if may_add and (progress[last] >= self.block_add_threshold or canvas.mask_counts[last] == 0):
            canvas.created += 1
        predecessors = np.concatenate(([1.0], progress[: canvas.created - 1]))
        canvas.activated[: canvas.created] |= predecessors >= self.decoded_token_threshold
        end = int(canvas.ends[canvas.created - 1])
        return np.flatnonzero(canvas.masked[:end]), end


Schedule = SequentialBlocks | MultiBlock
