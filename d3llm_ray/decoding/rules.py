"""The small differences between the published decoders of each family (decisions of d3LLM's two code paths)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from d3llm_ray.models import Family


@dataclass(frozen=True)
class FamilyRules:
    """How a family's published code decides where the paper leaves room."""

    strict_threshold: bool  # Dream reveals at H < threshold, LLaDA at H <= threshold
    always_reveal_best: bool  # LLaDA reveals the lowest-entropy position of all active blocks in every forward
    serial_stabilising: bool  # LLaDA's cache delays add up block after block, Dream's overlap
    order: Literal["confidence", "entropy"]  # what vanilla decoding ranks by


_LLADA = FamilyRules(strict_threshold=False, always_reveal_best=True, serial_stabilising=True, order="confidence")
_DREAM = FamilyRules(strict_threshold=True, always_reveal_best=False, serial_stabilising=False, order="entropy")


def family_rules(family: Family) -> FamilyRules:
    return _LLADA if family.name == "llada" else _DREAM
