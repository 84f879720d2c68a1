"""The least time a forward can take: its arithmetic at peak rate, or its memory traffic at full bandwidth.

A ceiling, not a forecast: perfect overlap, no launch cost, activations ignored (Williams et al. 2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from d3llm_ray.benchmark.machine import Machine
from d3llm_ray.models import ModelConfig, Work


@dataclass(frozen=True)
class Roofline:
    """Sums over the forwards of one measurement; `seconds` adds up the ceiling of each."""

    flops: int
    bytes: int
    seconds: float
    compute_bound: int  # forwards that arithmetic limits, not memory


def roofline(config: ModelConfig, dtype: torch.dtype, forwards: Sequence[Work], machine: Machine) -> Roofline:
    """Add up the ceilings of `forwards` on `machine`, each on its own: a mix of full and cached ones is no average."""
    operations = [config.flops(work) for work in forwards]
    moved = [config.traffic(work, dtype.itemsize) for work in forwards]
    compute = [count / machine.flops for count in operations]
    memory = [count / machine.bandwidth for count in moved]
    return Roofline(
        flops=sum(operations),
        bytes=sum(moved),
        seconds=sum(map(max, compute, memory)),
        compute_bound=sum(c > m for c, m in zip(compute, memory, strict=True)),
    )
