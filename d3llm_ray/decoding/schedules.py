"""Schedules: which blocks may be decoded now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from d3llm_ray.decoding.canvas import Canvas
from d3llm_ray.decoding.contracts import Opening
from d3llm_ray.errors import require


@dataclass(frozen=True)
class SequentialBlocks:
    """One block after another, left to right (LLaDA's semi-autoregressive decoding)."""

    growing: ClassVar[bool] = False
    aligned: ClassVar[bool] = False
    initial_blocks: ClassVar[int] = 1
    fixed_block_size: ClassVar[int | None] = None

    def open(self, canvas: Canvas) -> Opening:
        block = canvas.first_open_block()
        canvas.created = max(canvas.created, block + 1)
        canvas.activated[block] = True
        start, end = canvas.starts[block], canvas.ends[block]
        return Opening(start + canvas.masked[start:end].nonzero()[0], start, end)


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
        size = self.sub_block_size
        require(isinstance(size, int) and size > 0, "sub_block_size", size, "a positive number of tokens")

    def open(self, canvas: Canvas) -> Opening:
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
    """Multi-block decoding: several blocks at once (d3LLM section 4.1; block states as in D2F, arXiv:2508.09192).

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
        if canvas.created < canvas.num_blocks and not (self.growing and canvas.stop is not None):
            canvas.created += canvas.progress(canvas.created - 1) >= self.block_add_threshold
        for block in range(canvas.first_open_block(), canvas.created):
            if canvas.progress(block - 1) >= self.decoded_token_threshold:
                canvas.activated[block] = True
        end = canvas.created_end
        if canvas.stop is not None and not canvas.masked[canvas.stop :].any():
            # Everything behind the stop token is filled: the active region ends with its block.
            end = canvas.ends[canvas.block_of(canvas.stop)]
        return Opening(canvas.masked[:end].nonzero()[0], 0, end)


@dataclass(frozen=True)
class GrowingMultiBlock(MultiBlock):
    """D2F's pipeline (arXiv:2508.09192, section 3.3): the canvas begins as the prompt and grows block by block."""

    growing: ClassVar[bool] = True
    initial_blocks: ClassVar[int] = 0
