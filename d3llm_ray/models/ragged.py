"""Ragged batches: windows of several sequences packed into one token axis.

Linear layers see the packed axis, so no padding is ever computed there; only attention needs a rectangle, and its
mask hides whatever the rectangle adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d3llm_ray.errors import require
from d3llm_ray.models.config import Work

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class BlockCausal:
    """Attention that is full inside a block and causal across blocks.

    Positions before `origin` form one block (D2F: the prompt); from it on, every `block_size` positions are a block.
    Origin 0 gives Fast-dLLM v2's pattern, block size 1 with origin 0 plain causal attention.
    """

    block_size: int
    origin: int = 0

    def __post_init__(self) -> None:
        require(self.block_size > 0, "block_size", self.block_size, "a positive whole number")

    def visible(self, positions: IntArray) -> IntArray:
        """Number of leading keys that each query position sees."""
        behind = np.maximum((positions - self.origin) // self.block_size + 1, 0)
        return self.origin + behind * self.block_size


Pattern = BlockCausal | None  # None: full bidirectional attention


@dataclass(frozen=True)
class Varlen:
    """Packed queries and keys: offsets [B + 1] int32; `read` [sum of key lengths], or None for [begin, end)."""

    query_offsets: Tensor
    key_offsets: Tensor
    read: Tensor | None
    begin: int
    end: int


@dataclass(frozen=True)
class Ragged:
    """One batch of windows: row b holds `lengths[b]` tokens from absolute position `starts[b]`.

    T is the sum of lengths, B the number of rows, W the longest window, S the longest key span. Row b attends to
    key positions [0, key_lengths[b]) of its own sequence, or to fewer by its pattern. Keys live in a flat store:
    the packed keys of this forward themselves, or a `KVCache` in which row b's position p is at `bases[b] + p`.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    key_lengths: tuple[int, ...]
    bases: tuple[int, ...]  # place of each row's position 0 in the flat key store
    positions: Tensor  # [T] int64, rotary position of each packed token
    gather: Tensor | None  # [B, W] int64 into the packed axis; None when every window has W tokens
    scatter: Tensor | None  # [T] int64 into the flattened rectangle [B * W]
    write: Tensor | None  # [T] int64 into the key store; None for one row or without a cache
    read: Tensor | None  # [B, S] int64 into the key store; None when the rows' spans lie one behind another
    mask: Tensor | None  # [B, 1, W or 1, S] bool, True where attention is allowed; None when all is
    patterned: bool = False  # some row's attention is not full

    @staticmethod
    def build(
        lengths: Sequence[int],
        starts: Sequence[int] | None = None,
        key_lengths: Sequence[int] | None = None,
        *,
        pattern: Pattern = None,
        patterns: Sequence[Pattern] | None = None,
        bases: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Ragged:
        """Lay out windows. `starts` defaults to 0, `key_lengths` to the window's end.

        `patterns` has one for each row, `pattern` is for all of them. `bases` places the rows in a `KVCache`;
        without it a row attends to this forward's own keys, so that its window must start at 0.
        """
        length = np.asarray(lengths, dtype=np.int64)
        require(length.size > 0 and int(length.min()) > 0, "lengths", list(lengths), "one or more positive lengths")
        start = np.zeros_like(length) if starts is None else np.asarray(starts, dtype=np.int64)
        keys = start + length if key_lengths is None else np.asarray(key_lengths, dtype=np.int64)
        count, width, span = length.size, int(length.max()), int(keys.max())
        first = np.cumsum(length) - length  # packed index of each row's first token
        base = first if bases is None else np.asarray(bases, dtype=np.int64)
        by_row = patterns if patterns is not None else [pattern] * count
        gather = scatter = write = read = mask = None
        if count == 1:
            positions = np.arange(start[0], start[0] + length[0])
        else:
            rows = np.repeat(np.arange(count), length)
            offsets = np.arange(rows.size) - first[rows]
            positions = start[rows] + offsets
            if int(length.min()) != width:
                # Rectangle cells beyond a window repeat its last token: finite values, dropped by `scatter`.
                gather = first[:, None] + np.minimum(np.arange(width), length[:, None] - 1)
                scatter = rows * width + offsets
            if bases is not None:
                write = base[rows] + positions
            if bases is not None or int(keys.min()) != span:
                # Likewise for keys: what lies behind a row's span is another sequence's, or was never written.
                read = base[:, None] + np.minimum(np.arange(span), keys[:, None] - 1)
        if any(chosen is not None for chosen in by_row):
            query = start[:, None] + np.minimum(np.arange(width), length[:, None] - 1)
            seen = np.broadcast_to(keys[:, None], query.shape).copy()
            for row, mask_of in enumerate(by_row):
                if mask_of is not None:
                    seen[row] = np.minimum(seen[row], mask_of.visible(query[row]))
            if int(seen.min()) != span:
                mask = np.arange(span) < seen[:, None, :, None]
        elif int(keys.min()) != span:
            mask = np.arange(span) < keys[:, None, None, None]

        def put(array: NDArray[Any] | None) -> Tensor | None:
            return None if array is None else torch.from_numpy(array).to(device)

        return Ragged(
            tuple(length.tolist()),
            tuple(start.tolist()),
            tuple(keys.tolist()),
            tuple(base.tolist()),
            torch.from_numpy(positions).to(device),
            put(gather),
            put(scatter),
            put(write),
            put(read),
            put(mask),
            any(chosen is not None for chosen in by_row),
        )

    @staticmethod
    def static(
        positions: Tensor, write: Tensor, visible: Tensor, bases: Tensor, key_lengths: Tensor, span: int
    ) -> Ragged:
        """Lay out B windows of W tokens each on the device, from tensors whose values the host never sees.

        Of each token, [B, W] int64: position, place in the `KVCache`, number of leading keys that it sees. Of each row,
        [B] int64: base and key length, at most S = `span`. For `sdpa_attention` only, since kernels that take packed
        sequences need lengths on the host: it counts as patterned.
        """
        count, width = positions.shape
        cells = torch.arange(span, device=positions.device)
        return Ragged(
            lengths=(width,) * count,
            starts=(),
            key_lengths=(span,) * count,
            bases=(),
            positions=positions.flatten(),
            gather=None,
            scatter=None,
            write=write.flatten(),
            read=bases[:, None] + torch.minimum(cells, key_lengths[:, None] - 1),
            mask=cells < visible[:, None, :, None],
            patterned=True,
        )

    def work(self, scored: int) -> Work:
        """What one model call of this layout computes, with `scored` rows of the LM head."""
        attended = sum(window * keys for window, keys in zip(self.lengths, self.key_lengths, strict=True))
        return Work(sum(self.lengths), attended, sum(self.key_lengths), scored)

    @cached_property
    def rows(self) -> Tensor:
        """[T] int64, the row of each packed token."""
        lengths = torch.tensor(self.lengths, device=self.positions.device)
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=lengths.device), lengths)

    @cached_property
    def varlen(self) -> Varlen:
        """The same layout for kernels that take packed sequences with offsets."""
        device = self.positions.device
        keys = np.asarray(self.key_lengths)
        ends = np.cumsum(keys)
        read = None
        if self.read is not None:
            row = np.repeat(np.arange(keys.size), keys)
            place = np.asarray(self.bases)[row] + np.arange(row.size) - (ends - keys)[row]
            read = torch.from_numpy(place).to(device)

        def offsets(lengths: Sequence[int]) -> Tensor:
            return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)

        begin = self.bases[0]
        return Varlen(offsets(self.lengths), offsets(self.key_lengths), read, begin, begin + int(ends[-1]))

    def to_rectangle(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [B, W, ...]; cells beyond a row's window hold copies that attention masks or drops."""
        if self.gather is None:
            return packed.view(len(self.lengths), -1, *packed.shape[1:])
        return _take(packed, self.gather)

    def to_packed(self, rectangle: Tensor) -> Tensor:
        """[B, W, ...] -> [T, ...], dropping the cells beyond each row's window."""
        flat = rectangle.flatten(0, 1)
        return flat if self.scatter is None else flat.index_select(0, self.scatter)

    def key_rectangle(self, store: Tensor) -> Tensor:
        """The rows' key spans, [B, S, ...], from a flat key store [positions, ...]."""
        if self.read is not None:
            return _take(store, self.read)
        begin, count = self.bases[0], len(self.lengths)
        return store[begin : begin + count * self.key_lengths[0]].view(count, -1, *store.shape[1:])


def _take(rows: Tensor, places: Tensor) -> Tensor:
    """rows[places] for `places` [B, N]; several times as fast on a CPU."""
    return rows.index_select(0, places.flatten()).view(*places.shape, *rows.shape[1:])
