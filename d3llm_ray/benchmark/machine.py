"""What a machine can do at most: data sheets of common cards, or a short test of the one at hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from d3llm_ray.benchmark.plan import MEASURED
from d3llm_ray.device import timed
from d3llm_ray.errors import unknown


@dataclass(frozen=True)
class Machine:
    """`flops` in floating-point operations a second, `bandwidth` in bytes a second."""

    name: str
    flops: float
    bandwidth: float

    def __str__(self) -> str:
        return f"roofline ({self.name}): {self.flops / 1e12:.4g} TFLOP/s, {self.bandwidth / 1e9:.4g} GB/s"


# Dense bfloat16 peak and memory bandwidth from NVIDIA's data sheets of the SXM cards.
MACHINES = {
    machine.name: machine
    for machine in (
        Machine("a100", 312e12, 2.039e12),
        Machine("h100", 989.4e12, 3.35e12),
        Machine("h200", 989.4e12, 4.8e12),
        Machine("b200", 2250e12, 8.0e12),
    )
}

_ROUNDS = 5


def check_machine(name: str) -> None:
    """Raise `InputError` unless `find_machine` knows the name."""
    if name != MEASURED and name not in MACHINES:
        raise unknown("machine", name, [MEASURED, *MACHINES])


def data_sheet(device: torch.device) -> Machine | None:
    """The data sheet of this card, by its name; None for a CPU, an unknown card or another form factor than SXM."""
    if device.type != "cuda":
        return None
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    other = {"pcie", "nvl"} & set(words)
    return None if other else next((MACHINES[word] for word in words if word in MACHINES), None)


def find_machine(name: str, device: torch.device, dtype: torch.dtype) -> Machine:
    """The named machine, or with "measured" what `device` reaches in `dtype` (a second or two)."""
    return measure_machine(device, dtype) if name == MEASURED else MACHINES[name]


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The best of a few runs of a large square matrix product and of a copy far larger than any cache."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(1 << (30 if cuda else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    multiply = _best(device, lambda: torch.mm(a, b, out=product))
    copy = _best(device, lambda: target.copy_(source))
    return Machine(MEASURED, 2 * size**3 / multiply, 2 * source.numel() / copy)  # a copy reads and writes


def _best(device: torch.device, work: Callable[[], object]) -> float:
    work()  # the first call allocates and tunes
    return min(timed(device, work)[0] for _ in range(_ROUNDS))
