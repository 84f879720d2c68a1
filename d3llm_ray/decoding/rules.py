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
    remasking: Literal["low_confidence", "entropy"]  # what vanilla decoding ranks by
    logit_shift: bool  # the logits row before a position predicts it


def family_rules(family: Family) -> FamilyRules:
    """LLaDA's rules, or Dream's for every family with shifted logits."""
    shifted = family.logit_shift
    return FamilyRules(shifted, not shifted, not shifted, "entropy" if shifted else "low_confidence", shifted)
