"""Selections: which eligible masked positions are revealed by a forward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from d3llm_ray.decoding.canvas import BoolArray, Canvas, FloatArray, IntArray
from d3llm_ray.decoding.rules import FamilyRules
from d3llm_ray.errors import require


@dataclass(frozen=True)
class TopK:
    """A fixed number of positions a forward: `steps` forwards for the whole canvas (LLaDA generate.py).

    A block of m masks that has S forwards reveals m // S positions in each, and one more in the first
    m % S. `steps` None means one token a forward.
    """

    steps: int | None = None

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps > 0, "steps", self.steps, "a positive whole number or null")

    def select(
        self, canvas: Canvas, eligible: IntArray, entropy: FloatArray, confidence: FloatArray, rules: FamilyRules
    ) -> tuple[BoolArray, BoolArray]:
        """(revealed, forced) flags over `eligible`; the two statistics have one figure for each of them.

        A forced position takes the most probable token whatever the temperature.
        """
        block = canvas.first_open_block()
        start, end = int(canvas.starts[block]), int(canvas.ends[block])
        total = min(self.steps or canvas.size, canvas.size)
        steps = max(1, total * end // canvas.size - total * start // canvas.size)
        step = int(canvas.steps_in_block[block])
        quota = (end - start) // steps + (step < (end - start) % steps)
        canvas.steps_in_block[block] += 1
        ranking = -confidence if rules.order == "confidence" else entropy
        chosen = np.argsort(ranking, kind="stable")[: max(1, quota)]  # ties: the lowest position
        revealed = np.zeros(len(eligible), dtype=np.bool_)
        revealed[chosen] = True
        return revealed, np.zeros_like(revealed)


@dataclass(frozen=True)
class EntropyThreshold:
    """Every position whose entropy (nats) is at most the threshold (dParallel, arXiv:2509.26488; d3LLM).

    Progress is guaranteed: where nothing in the first active block passes, its lowest-entropy position is
    revealed.
    """

    entropy_threshold: float = 0.45

    def __post_init__(self) -> None:
        accepted = "a number of nats, 0 or more"
        require(self.entropy_threshold >= 0, "entropy_threshold", self.entropy_threshold, accepted)

    def select(
        self, canvas: Canvas, eligible: IntArray, entropy: FloatArray, confidence: FloatArray, rules: FamilyRules
    ) -> tuple[BoolArray, BoolArray]:
        """As `TopK.select`."""
        threshold = np.float32(self.entropy_threshold)
        revealed = entropy < threshold if rules.strict_threshold else entropy <= threshold
        if rules.always_reveal_best:
            revealed[np.argmin(entropy)] = True
        forced = np.zeros_like(revealed)
        block = np.flatnonzero(canvas.activated & (canvas.mask_counts > 0))[0]
        in_block = eligible < canvas.ends[block]  # nothing before the first open block is eligible
        if not revealed[in_block].any():
            best = int(np.argmin(entropy[in_block]))
            revealed[best] = forced[best] = True
        return revealed, forced


Selection = TopK | EntropyThreshold
