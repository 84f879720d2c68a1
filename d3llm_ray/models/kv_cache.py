"""Keys and values by slot and absolute position, with a length of its own for every row."""

from __future__ import annotations

import torch
from torch import Tensor

from d3llm_ray.models.config import ModelConfig
from d3llm_ray.models.ragged import Ragged


class KVCache:
    """A preallocated pool: one slot a sequence, one place a position, post-rotary keys.

    Every forward writes its window in place, so "which keys are frozen" is only a matter of which
    positions the next window leaves out. That one layout serves prefix, dual and delayed caches, and
    no key can be held twice.
    """

    def __init__(
        self, config: ModelConfig, slots: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """`slots` sequences of at most `capacity` positions each."""
        shape = (config.num_layers, slots, capacity, config.num_kv_heads, config.head_dim)
        self.capacity = capacity
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [layers, slots, capacity, kv heads, head dim]
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._slots: Tensor | None = None

    @staticmethod
    def bytes_per_position(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes that one position of one slot takes over all layers, keys and values together."""
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize

    def copy_from(self, smaller: KVCache) -> None:
        """Take over every slot of a cache with the same slots and fewer positions."""
        self.keys[:, :, : smaller.capacity] = smaller.keys
        self.values[:, :, : smaller.capacity] = smaller.values

    def select(self, slots: Tensor) -> None:
        """Name the slot of each row of the next forward. `slots`: [B] int64."""
        self._slots = slots

    def update(self, layer: int, keys: Tensor, values: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor]:
        """Write a window's keys and values, [T, kv heads, head dim], and return the rows' whole spans [B, S, ...]."""
        assert self._slots is not None, "select the rows' slots before a forward"
        token_slots = self._slots[ragged.rows]
        span = max(ragged.key_lengths)
        layer_keys, layer_values = self.keys[layer], self.values[layer]
        layer_keys[token_slots, ragged.positions] = keys
        layer_values[token_slots, ragged.positions] = values
        return layer_keys[self._slots, :span], layer_values[self._slots, :span]
