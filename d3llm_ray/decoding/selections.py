"""Selections: which eligible masked positions are revealed by a forward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from d3llm_ray.decoding.canvas import BoolArray, Canvas
from d3llm_ray.decoding.contracts import Opening, Selected
from d3llm_ray.decoding.rules import FamilyRules
from d3llm_ray.decoding.statistics import TokenStatistics
from d3llm_ray.errors import require


def _best_of(scores: np.ndarray, where: BoolArray) -> int:
    """Index of the highest score among `where`; the lowest index on ties."""
    return int(np.argmax(np.where(where, scores, -np.inf)))


@dataclass(frozen=True)
class EntropyThreshold:
    """Entropy-based selection: every position whose entropy (nats) is at most the threshold (dParallel,
    arXiv:2509.26488; d3LLM).

    Guaranteed progress: where nothing in the first active block passes, its lowest-entropy position is
    revealed.
    """

    entropy_threshold: float = 0.45
    needs_margins: ClassVar[bool] = False

    def __post_init__(self) -> None:
        accepted = "a number of nats, 0 or more"
        require(self.entropy_threshold >= 0, "entropy_threshold", self.entropy_threshold, accepted)

    def select(
        self, canvas: Canvas, opening: Opening, statistics: TokenStatistics, rules: FamilyRules, seed: int
    ) -> Selected:
        entropy, threshold = statistics.entropy, np.float32(self.entropy_threshold)
        revealed = entropy < threshold if rules.strict_threshold else entropy <= threshold
        if rules.always_reveal_best:
            revealed[entropy.argmin()] = True
        # Nothing before the first open block is eligible, so that its masks are the first ones; a schedule has always
        # activated it.
        masks = canvas.mask_counts[canvas.first_open_block()]
        if revealed[:masks].any():
            return Selected(revealed)
        best = int(entropy[:masks].argmin())
        revealed[best] = True
        forced = np.zeros_like(revealed)
        forced[best] = True
        return Selected(revealed, forced)


@dataclass(frozen=True)
class _Confidence:
    confidence_threshold: float = 0.9
    needs_margins: ClassVar[bool] = False

    def __post_init__(self) -> None:
        accepted = "a probability from 0 to 1"
        require(0.0 <= self.confidence_threshold <= 1.0, "confidence_threshold", self.confidence_threshold, accepted)


@dataclass(frozen=True)
class ConfidenceThreshold(_Confidence):
    """Every position whose token has at least the threshold's probability, and always the best (Fast-dLLM v1,
    arXiv:2505.22618, section 3.3).

    With `factor` f instead: positions by falling confidence, as long as the n-th has at least 1 - f / (n + 1).
    """

    factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        accepted = "a number above 0, or null for the threshold"
        number = isinstance(self.factor, int | float) and 0.0 < self.factor < math.inf
        require(self.factor is None or number, "factor", self.factor, accepted)

    def select(
        self, canvas: Canvas, opening: Opening, statistics: TokenStatistics, rules: FamilyRules, seed: int
    ) -> Selected:
        confidence = statistics.confidence
        if self.factor is None:
            revealed = confidence >= np.float32(self.confidence_threshold)
            revealed[statistics.logprob.argmax()] = True
        else:
            order = np.argsort(-confidence, kind="stable")
            passes = confidence[order] >= 1.0 - self.factor / (np.arange(len(order)) + 2.0)
            passes[0] = True
            revealed = np.zeros(len(order), dtype=np.bool_)
            revealed[order[np.logical_and.accumulate(passes)]] = True
        return Selected(revealed)


@dataclass(frozen=True)
class SubBlockConfidence(_Confidence):
    """Fast-dLLM v2: above the threshold, and always the best; a block's boundary token is the most probable one."""

    def select(
        self, canvas: Canvas, opening: Opening, statistics: TokenStatistics, rules: FamilyRules, seed: int
    ) -> Selected:
        confidence = statistics.confidence
        revealed = confidence > np.float32(self.confidence_threshold)
        revealed[statistics.logprob.argmax()] = True
        return Selected(revealed, np.ones_like(revealed) if opening.boundary else None)


@dataclass(frozen=True)
class BlockwiseConfidence(_Confidence):
    """D2F: above the threshold in every block; a fully activated block with none reveals its best."""

    def select(
        self, canvas: Canvas, opening: Opening, statistics: TokenStatistics, rules: FamilyRules, seed: int
    ) -> Selected:
        confidence, eligible = statistics.confidence, opening.eligible
        revealed = confidence > np.float32(self.confidence_threshold)
        for block in range(canvas.first_open_block(), canvas.num_blocks):
            if not canvas.activated[block] or not canvas.mask_counts[block]:
                continue
            inside = (eligible >= canvas.starts[block]) & (eligible < canvas.ends[block])
            if not revealed[inside].any():
                revealed[_best_of(statistics.logprob, inside)] = True
        return Selected(revealed)


@dataclass(frozen=True)
class AllEligible:
    """Whatever the schedule opens: autoregressive decoding's one next token."""

    needs_margins: ClassVar[bool] = False

    def select(
        self, canvas: Canvas, opening: Opening, statistics: TokenStatistics, rules: FamilyRules, seed: int
    ) -> Selected:
        revealed = np.ones(len(opening.eligible), dtype=np.bool_)
        return Selected(revealed)


@dataclass(frozen=True)
class Scripted:
    """A fixed mean number of tokens a forward, from the left: a real schedule for a model with random weights."""

    tokens_per_forward: float
    needs_margins: ClassVar[bool] = False

    def __post_init__(self) -> None:
        accepted = "a number, 1 or more"
        require(1.0 <= self.tokens_per_forward < math.inf, "tokens_per_forward", self.tokens_per_forward, accepted)

    def select(
        self, canvas: Canvas, opening: Opening, statistics: TokenStatistics, rules: FamilyRules, seed: int
    ) -> Selected:
        due = int(canvas.forwards * self.tokens_per_forward) - int(canvas.masked.size - canvas.masked.sum())
        revealed = np.arange(len(opening.eligible)) < max(1, due)
        return Selected(revealed)
