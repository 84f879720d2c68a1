"""Memory: one preallocated pool of key and value positions, and a plan that says what goes where."""

from __future__ import annotations

import os
from bisect import insort
from dataclasses import dataclass

import torch

from d3llm_ray.decoding.static import SCRATCH, STATIC_KEY_CELLS, STATIC_TOKENS
from d3llm_ray.decoding.statistics import MAX_CHUNK_ELEMENTS
from d3llm_ray.models import Transformer

CUDA_FRACTION = 0.9  # of the device's memory, for weights, pool and activations together
CPU_FRACTION = 0.25  # of the host's memory, for the pool: other processes live here too
LOGIT_COPIES = 3  # of a chunk of float32 logits: themselves, exponentials, products
ACTIVATION_WIDTHS = 8  # live activations of a packed token, in units of the widest layer


class PositionPool:
    """Contiguous spans of a pool of positions. A canvas's length is known at admission, so one span is enough."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self._free: list[tuple[int, int]] = [(0, positions)]  # (start, length), by start

    @property
    def free(self) -> int:
        """Positions that no span holds."""
        return sum(length for _, length in self._free)

    def take(self, length: int) -> int | None:
        """Start of a free span of `length` positions, now taken; None when there is none."""
        for index, (start, free) in enumerate(self._free):
            if free >= length:
                self._free[index : index + 1] = [(start + length, free - length)] if free > length else []
                return start
        return None

    def give_back(self, start: int, length: int) -> None:
        """Free a span that `take` returned; neighbouring free spans grow together."""
        insort(self._free, (start, length))
        merged: list[tuple[int, int]] = []
        for begin, size in self._free:
            if merged and sum(merged[-1]) == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((begin, size))
        self._free = merged


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, and what they allow."""

    device: str
    weights: int
    kv_pool: int
    activations: int
    kv_positions: int
    bytes_per_position: int
    max_forward_tokens: int
    limit: int  # of the device, or of the host

    def lines(self) -> list[str]:
        """The plan in words, a line each."""
        gib = 2.0**30
        return [
            f"memory plan on {self.device} ({self.limit / gib:.1f} GiB):",
            f"  weights      {self.weights / gib:8.3f} GiB",
            f"  KV pool      {self.kv_pool / gib:8.3f} GiB: {self.kv_positions} positions of "
            f"{self.bytes_per_position / 1024:.1f} KiB",
            f"  activations  {self.activations / gib:8.3f} GiB at most: {self.max_forward_tokens} tokens a forward",
        ]


def plan_memory(
    model: Transformer,
    vocabulary: int,
    context: int,
    max_batch_size: int,
    max_forward_tokens: int,
    kv_positions: int | None,
    cuda_graphs: bool = False,
) -> MemoryPlan:
    """Size the pool: `kv_positions`, or what fits up to `max_batch_size` whole contexts.

    What fits is a fraction of the device's memory, after weights and the activations of `max_forward_tokens` packed
    tokens, with `cuda_graphs` also those that graphs keep. The pool holds at least one whole context if that much
    memory is there at all.
    """
    weight = model.embed_tokens.weight
    shape, size, device = model.config, weight.dtype.itemsize, weight.device
    weights = sum(p.numel() * p.dtype.itemsize for p in model.parameters())
    per_position = shape.kv_bytes(size)
    widest = shape.widest
    gathered = 2 * per_position // shape.num_layers  # keys and values of one layer, copied into a rectangle
    logits = 4 * min(MAX_CHUNK_ELEMENTS, max_forward_tokens * vocabulary)
    activations = max_forward_tokens * (ACTIVATION_WIDTHS * widest * size + gathered) + LOGIT_COPIES * logits
    if cuda_graphs:
        activations += STATIC_TOKENS * ACTIVATION_WIDTHS * widest * size + STATIC_KEY_CELLS * gathered
        activations += LOGIT_COPIES * logits + SCRATCH * per_position
    if device.type == "cuda":
        free, limit = torch.cuda.mem_get_info(device)
        room = free - int((1 - CUDA_FRACTION) * limit) - activations
    else:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        room = int(CPU_FRACTION * limit)
    if kv_positions is None:
        kv_positions = max(min(max_batch_size * context, room // per_position), min(context, limit // per_position))
    pool = kv_positions * per_position
    figures = weights, pool, activations, kv_positions, per_position, max_forward_tokens, limit
    return MemoryPlan(str(device), *figures)
