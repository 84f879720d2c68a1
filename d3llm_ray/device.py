"""What a device takes: wall-clock time that covers its work and nothing else, and peak memory."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from d3llm_ray.errors import require

T = TypeVar("T")


def timed(device: torch.device, work: Callable[[], T]) -> tuple[float, T]:
    """(seconds, result) of `work`, the device's share included."""
    synchronise(device)
    began = time.perf_counter()
    result = work()
    synchronise(device)
    return time.perf_counter() - began, result


def synchronise(device: torch.device) -> None:
    """Wait for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: of PyTorch's allocations on a GPU, otherwise of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)  # bytes on macOS, KiB elsewhere


def check_device(name: str) -> None:
    """Raise `InputError` unless the device is here."""
    check_device_name(name)
    device = torch.device(name)
    here = device.type == "cpu" or (device.index or 0) < torch.cuda.device_count()
    require(here, "device", name, "cpu, or cuda or cuda:N where there is one")


def check_device_name(name: str) -> None:
    """Raise `InputError` for what is no device's name: all that can be said where other machines do the work."""
    require(re.fullmatch(r"cpu|cuda(:\d+)?", name) is not None, "device", name, "cpu, cuda or cuda:N")
