"""Ragged batches: windows of several sequences packed into one token axis.

Linear layers see the packed axis, so no padding is ever computed there; only attention needs a
rectangle, and its mask hides whatever the rectangle adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d3llm_ray.errors import require


@dataclass(frozen=True)
class BlockCausal:
    """Attention that is full inside a block and causal across blocks.

    A row's positions before its origin form one block (D2F: the prompt); from the origin on, every
    `block_size` positions are a block. Origin 0 gives Fast-dLLM v2's pattern, block size 1 with
    origin 0 plain causal attention.
    """

    block_size: int

    def __post_init__(self) -> None:
        require(self.block_size > 0, "block_size", self.block_size, "a positive whole number")


@dataclass(frozen=True)
class Ragged:
    """One batch of windows: row b holds `lengths[b]` tokens from absolute position `starts[b]`.

    T is the sum of lengths, B the number of rows, W the longest window, S the longest key span.
    Row b attends to key positions [0, key_lengths[b]) of its own sequence.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    key_lengths: tuple[int, ...]
    positions: Tensor  # [T] int64, rotary position of each packed token
    rows: Tensor  # [T] int64, row of each packed token
    gather: Tensor | None  # [B, W] int64 into the packed axis; None when every window has W tokens
    scatter: Tensor | None  # [T] int64 into the flattened rectangle [B * W]
    mask: Tensor | None  # [B, 1, W, S] bool, True where attention is allowed; None when all is

    @staticmethod
    def build(
        lengths: Sequence[int],
        starts: Sequence[int] | None = None,
        key_lengths: Sequence[int] | None = None,
        *,
        pattern: BlockCausal | None = None,
        origins: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Ragged:
        """Lay out windows. `starts` defaults to 0, `key_lengths` to the window's end.

        `pattern` None means full bidirectional attention; `origins` (default 0) are the rows' block
        origins for a `BlockCausal` pattern.
        """
        length = np.asarray(lengths, dtype=np.int64)
        require(length.size > 0 and int(length.min()) > 0, "lengths", list(lengths), "one or more positive lengths")
        start = np.zeros_like(length) if starts is None else np.asarray(starts, dtype=np.int64)
        keys = start + length if key_lengths is None else np.asarray(key_lengths, dtype=np.int64)
        width, span, total = int(length.max()), int(keys.max()), int(length.sum())
        first = np.concatenate(([0], np.cumsum(length)[:-1]))  # packed index of each row's first token
        rows = np.repeat(np.arange(length.size), length)
        offsets = np.arange(total) - first[rows]
        positions = start[rows] + offsets
        gather = scatter = mask = None
        columns = np.arange(width)
        if int(length.min()) != width:
            # Rectangle cells beyond a window repeat its last token: finite values, dropped by `scatter`.
            gather = first[:, None] + np.minimum(columns, length[:, None] - 1)
            scatter = rows * width + offsets
        if pattern is not None or int(keys.min()) != span:
            key_position = np.arange(span)
            allowed = (key_position < keys[:, None])[:, None, :]
            if pattern is not None:
                origin = np.zeros_like(length) if origins is None else np.asarray(origins, dtype=np.int64)
                query_position = start[:, None] + np.minimum(columns, length[:, None] - 1)
                query_block = np.maximum((query_position - origin[:, None]) // pattern.block_size + 1, 0)
                key_block = np.maximum((key_position - origin[:, None]) // pattern.block_size + 1, 0)
                allowed = allowed & (key_block[:, None, :] <= query_block[:, :, None])
            mask = np.broadcast_to(allowed, (length.size, width, span))[:, None]

        def put(array: np.ndarray | None) -> Tensor | None:
            return None if array is None else torch.from_numpy(np.array(array)).to(device)

        packed_positions, packed_rows = put(positions), put(rows)
        assert packed_positions is not None and packed_rows is not None
        return Ragged(
            tuple(int(n) for n in length),
            tuple(int(n) for n in start),
            tuple(int(n) for n in keys),
            packed_positions,
            packed_rows,
            put(gather),
            put(scatter),
            put(mask),
        )

    def to_rectangle(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [B, W, ...]; cells beyond a row's window hold copies that attention masks or drops."""
        if self.gather is None:
            return packed.view(len(self.lengths), -1, *packed.shape[1:])
        return packed[self.gather]

    def to_packed(self, rectangle: Tensor) -> Tensor:
        """[B, W, ...] -> [T, ...], dropping the cells beyond each row's window."""
        flat = rectangle.flatten(0, 1)
        return flat if self.scatter is None else flat[self.scatter]
