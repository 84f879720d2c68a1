"""The least time a forward can take: its arithmetic at peak rate, or its memory traffic at full bandwidth.

A ceiling, not a forecast: perfect overlap, no launch cost, activations ignored (Williams et al. 2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from d3llm_ray.benchmark.machine import Machine
from d3llm_ray.models import KVCache, ModelConfig, Ragged


@dataclass(frozen=True)
class Work:
    """What one forward computes, summed over its rows (requests), in however many model calls it is run."""

    tokens: int  # positions computed
    attended: int  # query-key pairs: window length x key length
    keys: int  # key positions read
    scored: int  # rows of the LM head's output

    @staticmethod
    def of(ragged: Ragged, scored: int) -> Work:
        """Of one model call."""
        attended = sum(window * keys for window, keys in zip(ragged.lengths, ragged.key_lengths, strict=True))
        return Work(sum(ragged.lengths), attended, sum(ragged.key_lengths), scored)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens,
            self.attended + other.attended,
            self.keys + other.keys,
            self.scored + other.scored,
        )


def body_parameters(config: ModelConfig) -> int:
    """Weights of the layers' matrices; norms and biases, below a thousandth of them, are left out."""
    kv_size = config.num_kv_heads * config.head_dim
    attention = 2 * config.hidden_size * (config.hidden_size + kv_size)
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def head_parameters(config: ModelConfig) -> int:
    """Weights of the LM head."""
    return config.vocab_size * config.hidden_size


def flops(config: ModelConfig, work: Work) -> int:
    """Floating-point operations of a forward: matrices, LM head on the scored rows, attention.

    Masked query-key pairs count like others, and the last layer counts for every position, though only scored rows
    need all of it.
    """
    attention = 4 * config.num_layers * config.hidden_size * work.attended
    return 2 * body_parameters(config) * work.tokens + 2 * head_parameters(config) * work.scored + attention


def traffic(config: ModelConfig, work: Work, dtype: torch.dtype) -> int:
    """Bytes of a forward: all weights once, keys and values once, logits written once and read once."""
    weights = (body_parameters(config) + head_parameters(config)) * dtype.itemsize
    logits = 2 * work.scored * config.vocab_size * dtype.itemsize
    return weights + work.keys * KVCache.bytes_per_position(config, dtype) + logits


@dataclass(frozen=True)
class Roofline:
    """Sums over the forwards of one measurement; `seconds` adds up the ceiling of each."""

    flops: int
    bytes: int
    seconds: float
    compute_bound: int  # forwards that arithmetic limits, not memory


def roofline(config: ModelConfig, dtype: torch.dtype, forwards: Sequence[Work], machine: Machine) -> Roofline:
    """Add up the ceilings of `forwards` on `machine`, each on its own: a mix of full and cached ones is no average."""
    operations = [flops(config, work) for work in forwards]
    moved = [traffic(config, work, dtype) for work in forwards]
    compute = [count / machine.flops for count in operations]
    memory = [count / machine.bandwidth for count in moved]
    return Roofline(
        flops=sum(operations),
        bytes=sum(moved),
        seconds=sum(map(max, compute, memory)),
        compute_bound=sum(c > m for c, m in zip(compute, memory, strict=True)),
    )
