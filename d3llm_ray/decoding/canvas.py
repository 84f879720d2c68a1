"""The state of one request: its tokens, which of them are still masked, and its blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


class Canvas:
    """Prompt followed by `size` response positions, all masked at first (d3LLM, arXiv:2601.07568, section 4).

    Response positions are counted from 0 behind the prompt; `tokens` is indexed absolutely. Blocks have
    `block_size` positions; the last one is shorter where `size` is no multiple.
    """

    def __init__(self, prompt_ids: Sequence[int], size: int, block_size: int, mask_id: int) -> None:
        self.prompt_length = len(prompt_ids)
        self.size = size
        self.tokens: IntArray = np.full(self.prompt_length + size, mask_id, dtype=np.int64)
        self.tokens[: self.prompt_length] = prompt_ids
        self.masked: BoolArray = np.ones(size, dtype=np.bool_)
        self.reveal_step: IntArray = np.zeros(size, dtype=np.int64)
        self.reveal_entropy: FloatArray = np.zeros(size, dtype=np.float32)
        self.forwards = 0
        self.stop: int | None = None  # response position of the first stop token, once early stop has seen one
        # Block state. `created`: the first so many blocks may be decoded; `activated`: decoded at full effort.
        self.starts: IntArray = np.arange(0, size, block_size, dtype=np.int64)
        self.ends: IntArray = np.minimum(self.starts + block_size, size)
        self.mask_counts: IntArray = self.ends - self.starts
        self.created = 1
        self.activated: BoolArray = np.zeros(len(self.starts), dtype=np.bool_)
        self.steps_in_block: IntArray = np.zeros(len(self.starts), dtype=np.int64)
        # Cache state: absolute positions [0, cached) have frozen keys; forward at which a span was seen finished.
        self.cached = 0
        self.finished_at: dict[int, int] = {}

    @property
    def length(self) -> int:
        """Absolute length: prompt and response."""
        return self.prompt_length + self.size

    @property
    def num_blocks(self) -> int:
        return len(self.starts)

    @property
    def progress(self) -> NDArray[np.float64]:
        """Decoded fraction of every block."""
        return 1.0 - self.mask_counts / (self.ends - self.starts)

    def first_open_block(self) -> int:
        """Index of the first block that still has masks; `num_blocks` when there is none."""
        open_blocks = np.flatnonzero(self.mask_counts)
        return int(open_blocks[0]) if open_blocks.size else self.num_blocks

    @property
    def committed(self) -> int:
        """Length of the contiguous revealed prefix of the response: it never changes any more."""
        masks = np.flatnonzero(self.masked)
        return int(masks[0]) if masks.size else self.size

    def commit(self, positions: IntArray, token_ids: IntArray, entropies: FloatArray) -> None:
        """Reveal response `positions` with their tokens, in the forward that has just been counted."""
        self.tokens[self.prompt_length + positions] = token_ids
        self.masked[positions] = False
        self.reveal_step[positions] = self.forwards - 1
        self.reveal_entropy[positions] = entropies
        self._count_masks()

    def fill_after_stop(self, stop_ids: Sequence[int], eos_id: int) -> None:
        """Early stop: everything behind the first stop token becomes end-of-text (d3LLM's `handle_early_stop`).

        The first stop position may move left as earlier positions are revealed.
        """
        response = self.tokens[self.prompt_length :]
        end = self.size if self.stop is None else self.stop
        found = np.flatnonzero(np.isin(response[:end], stop_ids) & ~self.masked[:end])
        if found.size == 0:
            return
        self.stop = int(found[0])
        tail = slice(self.stop + 1, None)
        self.reveal_step[tail][self.masked[tail]] = self.forwards - 1
        response[tail] = eos_id
        self.masked[tail] = False
        self.created = self.num_blocks
        self._count_masks()

    def _count_masks(self) -> None:
        self.mask_counts = np.add.reduceat(self.masked, self.starts, dtype=np.int64)
