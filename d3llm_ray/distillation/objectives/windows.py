"""d3LLM and dParallel: cross-entropy on a masked window, and entropy where the student is already right.

arXiv:2601.07568, section 3 (trajectory order, noise and window curriculum); arXiv:2509.26488, section 3 (certainty
forcing on random masks of one block).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from d3llm_ray.distillation.objectives.base import Batch, LossModule, Scheduled, masked_mean, token_terms
from d3llm_ray.distillation.objectives.batches import MicroBatch, Sample, View
from d3llm_ray.distillation.objectives.corruption import (
    Draws,
    MaskOrder,
    RatioRounding,
    choose_views,
    corrupted,
    draw_window,
)
from d3llm_ray.models.families import Family
from d3llm_ray.models.ragged import Ragged

EntropyViews = Literal["a", "both"]


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms. `entropy_views`: d3LLM's LLaDA recipe sharpens view A only, the others both."""

    ce: float
    complement: float
    entropy: float
    entropy_views: EntropyViews
    temperature: float


@dataclass(frozen=True)
class MaskedWindows:
    """One window of the answer, split between a masked view and its complement (left out at weight 0)."""

    weights: LossWeights
    noise_max: float
    order: MaskOrder = "trajectory"
    rounding: RatioRounding = "exact"
    inverted_pairs: float = 0.0

    figures: ClassVar[tuple[str, ...]] = ("ce", "complement", "entropy", "right")

    def views(self, draws: Draws, sample: Sample, scheduled: Scheduled, family: Family) -> list[View]:
        """View A, and view B unless its weight is 0."""
        assert family.mask_token_id is not None
        window = draw_window(
            draws.epoch, sample.response_ids.size, scheduled.window, scheduled.noise_floor, self.noise_max
        )
        split = choose_views(
            draws.epoch,
            sample.reveal_step,
            window,
            order=self.order,
            rounding=self.rounding,
            inverted_pairs=self.inverted_pairs,
            order_rng=draws.lasting,
        )
        views = []
        for chosen in (split.masked, split.complement) if self.weights.complement > 0 else (split.masked,):
            noisy = corrupted(sample.response_ids, chosen, family.mask_token_id, window.end)
            views.append(
                View(
                    token_ids=np.concatenate((sample.prompt_ids, noisy)),
                    rows=sample.prompt_ids.size + chosen - int(family.logit_shift),
                    labels=sample.response_ids[chosen],
                    weights=np.ones(chosen.size, dtype=np.float32),
                    mask_ratio=chosen.size / (window.end - window.start),
                )
            )
        return views

    def layout(self, micro: MicroBatch, device: torch.device) -> Ragged:
        """Full attention: every token of a view sees all of it."""
        return Ragged.build(micro.lengths.tolist(), device=device)

    def loss(self, module: LossModule, batch: Batch) -> tuple[Tensor, Tensor]:
        """The weighted sum of cross-entropies and entropies, each a mean over its own tokens of the micro-batch."""
        terms = partial(_terms, module, self.weights.temperature)
        hidden = module.hidden(batch, batch.layout)
        ce, entropy, right = module.by_token(terms, hidden, batch.labels)
        return combine(ce, entropy, right, batch.second, self.weights)


def _terms(module: LossModule, temperature: float, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return token_terms(module.logits(hidden), labels, temperature)


def combine(ce: Tensor, entropy: Tensor, right: Tensor, second: Tensor, weights: LossWeights) -> tuple[Tensor, Tensor]:
    """The weighted loss and its figures, both from per-token terms [N]; `second` [N] bool marks view B.

    Every term is a mean over its own tokens of the micro-batch. Figures: [4] float32 without gradient; the last,
    `right`, is the share of supervised tokens whose argmax is the label.
    """
    view_b = second.float()
    view_a = 1 - view_b
    ce_a, ce_b = masked_mean(ce, view_a), masked_mean(ce, view_b)
    entropy_term = masked_mean(entropy, view_a * right)
    if weights.entropy_views == "both":
        entropy_term = entropy_term + masked_mean(entropy, view_b * right)
    loss = weights.ce * ce_a + weights.complement * ce_b + weights.entropy * entropy_term
    return loss, torch.stack((ce_a, ce_b, entropy_term, masked_mean(right, torch.ones_like(right)))).detach()
