"""Keys and values of all running sequences in one preallocated store."""

from __future__ import annotations

import torch
from torch import Tensor

from d3llm_ray.models.config import ModelConfig
from d3llm_ray.models.ragged import Ragged


class KVCache:
    """A flat store of positions, post-rotary keys; a sequence owns the positions from its base on.

    Every forward writes its window in place, so "which keys are frozen" is only a matter of which positions the
    next window leaves out. That one layout serves prefix, dual, delayed and block-causal caches, and no key can be
    held twice. A canvas has its final length from the start, so that one contiguous span is all a sequence needs.
    """

    def __init__(
        self, config: ModelConfig, positions: int, *, dtype: torch.dtype, device: torch.device | str, scratch: int = 0
    ) -> None:
        self._shape = (config.num_layers, positions + scratch, config.num_kv_heads, config.head_dim)
        self._dtype = dtype
        self.positions = positions  # of sequences; behind them lie the `scratch` ones, which padding writes to
        self.device = torch.device(device)
        # [layers, positions, kv heads, head dim] each, empty until `allocate`
        self.keys, self.values = (torch.empty(0, dtype=dtype, device=device) for _ in range(2))

    @property
    def allocated(self) -> bool:
        """Whether the store takes memory yet."""
        return self.keys.dim() > 1

    def allocate(self) -> KVCache:
        """Take the memory, which requests without a cache do not need; returns the cache itself."""
        if not self.allocated:
            self.keys, self.values = (torch.empty(self._shape, dtype=self._dtype, device=self.device) for _ in range(2))
        return self

    def write(self, layer: int, keys: Tensor, values: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor]:
        """Write a window's keys and values, [T, kv heads, head dim]; returns the layer's whole store."""
        layer_keys, layer_values = self.keys[layer], self.values[layer]
        if ragged.write is None:
            begin = ragged.bases[0] + ragged.starts[0]
            layer_keys[begin : begin + ragged.lengths[0]] = keys
            layer_values[begin : begin + ragged.lengths[0]] = values
        else:
            layer_keys.index_copy_(0, ragged.write, keys)
            layer_values.index_copy_(0, ragged.write, values)
        return layer_keys, layer_values
