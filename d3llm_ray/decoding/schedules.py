"""Schedules: which blocks may be decoded now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from d3llm_ray.decoding.canvas import Canvas, IntArray
from d3llm_ray.errors import require


@dataclass(frozen=True)
class Opening:
    """What may be decoded in one forward, in response positions.

    `start` and `end` bound the block, sub-block or blocks that `eligible` lies in; `start` is negative where a
    block begins in the prompt. `boundary`: the one eligible position is predicted by the row before its block.
    """

    eligible: IntArray
    start: int
    end: int
    boundary: bool = False


@dataclass(frozen=True)
class SequentialBlocks:
    """One block after another, left to right (LLaDA's semi-autoregressive decoding)."""

    growing: ClassVar[bool] = False  # the canvas ends with the last created block, so that a stop token ends it
    aligned: ClassVar[bool] = False  # blocks end at absolute multiples of the block size
    initial_blocks: ClassVar[int] = 1
    fixed_block_size: ClassVar[int | None] = None

    def open(self, canvas: Canvas) -> Opening:
        """Advance the block states before a forward."""
        block = canvas.first_open_block()
        canvas.created = max(canvas.created, block + 1)
        canvas.activated[block] = True
        start, end = int(canvas.starts[block]), int(canvas.ends[block])
        return Opening(start + np.flatnonzero(canvas.masked[start:end]), start, end)


@dataclass(frozen=True)
class NextToken(SequentialBlocks):
    """One token after another: autoregressive decoding as blocks of one."""

    growing: ClassVar[bool] = True
    fixed_block_size: ClassVar[int | None] = 1


@dataclass(frozen=True)
class SubBlocks(SequentialBlocks):
    """Block diffusion (Fast-dLLM v2, arXiv:2509.26328, section 3): blocks in order, sub-blocks in order within.

    Blocks are aligned to absolute multiples of the block size. The first token of a block that the prompt does
    not begin is the autoregressive prediction of the row before it.
    """

    sub_block_size: int = 8
    growing: ClassVar[bool] = True
    aligned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        accepted = "a positive number of tokens"
        require(
            isinstance(self.sub_block_size, int) and self.sub_block_size > 0,
            "sub_block_size",
            self.sub_block_size,
            accepted,
        )

    def open(self, canvas: Canvas) -> Opening:
        """As `SequentialBlocks.open`."""
        whole = SequentialBlocks.open(self, canvas)
        block_start = whole.end - canvas.block_size  # negative where the block begins in the prompt
        if block_start >= 0 and canvas.masked[block_start] and canvas.prompt_length + block_start > 0:
            return Opening(np.array([block_start]), block_start, whole.end, boundary=True)
        first = int(whole.eligible[0])
        start = block_start + (first - block_start) // self.sub_block_size * self.sub_block_size
        end = min(start + self.sub_block_size, whole.end)
        return Opening(whole.eligible[whole.eligible < end], start, end)


@dataclass(frozen=True)
class MultiBlock:
    """Several blocks at once (d3LLM section 4.1; block states as in D2F, arXiv:2508.09192).

    A block is added when the last one's decoded fraction reaches `block_add_threshold`, and fully activated
    when its predecessor's reaches `decoded_token_threshold` (the prompt counts as fully decoded).
    """

    block_add_threshold: float = 0.1
    decoded_token_threshold: float = 0.95
    growing: ClassVar[bool] = False
    aligned: ClassVar[bool] = False
    initial_blocks: ClassVar[int] = 1
    fixed_block_size: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        for field in ("block_add_threshold", "decoded_token_threshold"):
            value = getattr(self, field)
            require(0.0 <= value <= 1.0, field, value, "a fraction from 0 to 1")

    def open(self, canvas: Canvas) -> Opening:
        """As `SequentialBlocks.open`."""
        progress = np.concatenate(([1.0], canvas.progress))  # the prompt's first
        if canvas.created < canvas.num_blocks and not (self.growing and canvas.stop is not None):
            canvas.created += bool(progress[canvas.created] >= self.block_add_threshold)
        canvas.activated[: canvas.created] |= progress[: canvas.created] >= self.decoded_token_threshold
        end = canvas.created_end
        if canvas.stop is not None and not canvas.masked[canvas.stop :].any():
            # Everything behind the stop token is filled: the active region ends with its block.
            end = int(canvas.ends[np.searchsorted(canvas.ends, canvas.stop, side="right")])
        return Opening(np.flatnonzero(canvas.masked[:end]), 0, end)


@dataclass(frozen=True)
class GrowingMultiBlock(MultiBlock):
    """D2F's pipeline (arXiv:2508.09192, section 3.3): the canvas begins as the prompt and grows block by block."""

    growing: ClassVar[bool] = True
    initial_blocks: ClassVar[int] = 0


Schedule = SequentialBlocks | MultiBlock
