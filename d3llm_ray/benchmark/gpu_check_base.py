"""What the parts of the GPU check share: a part, what it runs on, and the two ways in which it can end early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Figures = Mapping[str, Any]  # JSON


@dataclass(frozen=True)
class Target:
    """What is checked. `quick` takes toy sizes: it checks the check itself, on a CPU."""

    device: torch.device
    quick: bool = False

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Part:
    """A piece of the check that is run, and kept, on its own. `estimate_s` is generous, for an H100."""

    name: str  # of its file
    section: str
    estimate_s: float
    run: Callable[[Target], Figures]


class Unavailable(Exception):
    """This machine lacks what the part needs; says what, and how to get it."""


class CheckFailed(Exception):
    """The part has found what it looks for."""

    def __init__(self, reason: str, figures: Figures) -> None:
        super().__init__(reason)
        self.figures = figures


def expect(condition: bool, reason: str, figures: Figures) -> Figures:
    """The figures of a part that has passed; `CheckFailed` otherwise."""
    if not condition:
        raise CheckFailed(reason, figures)
    return figures
