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

    Response positions are counted from 0 behind the prompt; `tokens` is indexed absolutely. Blocks have `block_size`
    positions; the last one is shorter where `size` is no multiple, and with `aligned` blocks, which end at absolute
    multiples of `block_size`, the first one is. `stop_ids` are the tokens that end this request's answer.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        size: int,
        block_size: int,
        mask_id: int,
        *,
        aligned: bool = False,
        created: int = 1,
        stop_ids: Sequence[int] = (),
    ) -> None:
        self.prompt_length = len(prompt_ids)
        self.size = size
        self.block_size = block_size
        self.length = self.prompt_length + size  # absolute: prompt and response
        self.tokens: IntArray = np.full(self.length, mask_id, dtype=np.int64)
        self.tokens[: self.prompt_length] = prompt_ids
        self.response = self.tokens[self.prompt_length :]  # a view
        self.masked: BoolArray = np.ones(size, dtype=np.bool_)
        self.reveal_step: IntArray = np.zeros(size, dtype=np.int64)
        self.reveal_entropy: FloatArray = np.zeros(size, dtype=np.float32)
        self.reveal_logprob: FloatArray = np.zeros(size, dtype=np.float32)
        self.forwards = 0
        self.stop_ids = frozenset(stop_ids)
        self.stop: int | None = None  # response position of the first revealed stop token
        # Block state. `created`: the first so many blocks may be decoded; `activated`: decoded at full effort.
        head = -self.prompt_length % block_size if aligned else 0
        starts = np.arange(head, size, block_size, dtype=np.int64)
        self.starts: IntArray = np.concatenate(([0], starts)) if head else starts
        self.ends: IntArray = np.append(self.starts[1:], size)
        self.mask_counts: IntArray = self.ends - self.starts
        self.created = created
        self.activated: BoolArray = np.zeros(len(self.starts), dtype=np.bool_)
        self.steps_in_block: IntArray = np.zeros(len(self.starts), dtype=np.int64)
        # Cache state: absolute positions [0, cached) have frozen keys; forward at which a span was seen finished;
        # the block or sub-block that the last full forward was made for.
        self.cached = 0
        self.finished_at: dict[int, int] = {}
        self.entered = -1

    @property
    def num_blocks(self) -> int:
        return len(self.starts)

    @property
    def created_end(self) -> int:
        """End of the created blocks (response position)."""
        return int(self.ends[self.created - 1]) if self.created else 0

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
        return int(self.masked.argmax()) if self.masked.any() else self.size

    def commit(self, positions: IntArray, token_ids: IntArray, entropies: FloatArray, logprobs: FloatArray) -> None:
        """Reveal response `positions` with their tokens, in the forward that has just been counted."""
        self.response[positions] = token_ids
        self.masked[positions] = False
        self.reveal_step[positions] = self.forwards - 1
        self.reveal_entropy[positions] = entropies
        self.reveal_logprob[positions] = logprobs
        self._count_masks()
        for position, token in zip(positions.tolist(), token_ids.tolist(), strict=True):
            if token in self.stop_ids and (self.stop is None or position < self.stop):
                self.stop = position

    def fill_after_stop(self, eos_id: int) -> None:
        """Early stop: everything behind the first stop token becomes end-of-text (d3LLM's `handle_early_stop`).

        The first stop position may move left as earlier positions are revealed.
        """
        if self.stop is not None:
            self.response[self.stop + 1 :] = eos_id
            self.created = self.num_blocks
            self.fill(eos_id, self.stop + 1)

    def fill(self, token_id: int, start: int = 0) -> None:
        """Write `token_id` to every masked response position from `start` on; they count as revealed now."""
        masked = np.flatnonzero(self.masked[start:]) + start
        self.response[masked] = token_id
        self.reveal_step[masked] = max(self.forwards - 1, 0)
        self.masked[masked] = False
        self._count_masks()

    def _count_masks(self) -> None:
        self.mask_counts = np.add.reduceat(self.masked, self.starts, dtype=np.int64)
