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

    Block states, in the paper's words: a block is inactive until it is created, then semi-activated, fully activated
    when its predecessor is decoded far enough, and completed when it has no mask left.

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
        # Block state, a list entry a block. `created`: the first so many blocks may be decoded; `activated`: decoded at
        # full effort.
        self._head = self.prompt_length % block_size if aligned else 0  # prompt positions in the first block
        self.starts = [0, *range(block_size - self._head, size, block_size)]
        self.ends = [*self.starts[1:], size]
        self.mask_counts = [end - start for start, end in zip(self.starts, self.ends, strict=True)]
        self.created = created
        self.activated = [False] * len(self.starts)
        self.steps_in_block = [0] * len(self.starts)
        self._first_open = 0
        # Cache state: absolute positions [0, cached) have frozen keys; forward at which a span was seen finished;
        # the block or sub-block that the last full forward was made for.
        self.cached = 0
        self.finished_at: dict[int, int] = {}
        self.entered = -1
        self.repeat = False  # the forward in hand is followed by another one of its block, should it finish it

    @property
    def num_blocks(self) -> int:
        return len(self.starts)

    @property
    def created_end(self) -> int:
        """End of the created blocks (response position)."""
        return self.ends[self.created - 1] if self.created else 0

    def block_of(self, position: int) -> int:
        """Index of the block that a response position lies in."""
        return (position + self._head) // self.block_size

    def progress(self, block: int) -> float:
        """Decoded fraction of a block; what is before the first one, the prompt, is decoded."""
        return 1.0 - self.mask_counts[block] / (self.ends[block] - self.starts[block]) if block >= 0 else 1.0

    def first_open_block(self) -> int:
        """Index of the first block that still has masks; `num_blocks` when there is none."""
        while self._first_open < len(self.mask_counts) and not self.mask_counts[self._first_open]:
            self._first_open += 1  # what is revealed stays so
        return self._first_open

    @property
    def committed(self) -> int:
        """Length of the contiguous revealed prefix of the response: it never changes any more."""
        block = self.first_open_block()
        if block == self.num_blocks:
            return self.size
        start = self.starts[block]
        return start + int(self.masked[start : self.ends[block]].argmax())

    def commit(self, positions: IntArray, token_ids: IntArray, entropies: FloatArray, logprobs: FloatArray) -> None:
        """Reveal response `positions` with their tokens, in the forward that has just been counted."""
        self.response[positions] = token_ids
        self.masked[positions] = False
        self.reveal_step[positions] = self.forwards - 1
        self.reveal_entropy[positions] = entropies
        self.reveal_logprob[positions] = logprobs
        revealed = positions.tolist()
        for position in revealed:
            self.mask_counts[self.block_of(position)] -= 1
        tokens = token_ids.tolist()
        if not self.stop_ids.isdisjoint(tokens):
            stops = [place for place, token in zip(revealed, tokens, strict=True) if token in self.stop_ids]
            self.stop = min(stops) if self.stop is None else min(self.stop, *stops)

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
        self.mask_counts = np.add.reduceat(self.masked, self.starts, dtype=np.int64).tolist()
