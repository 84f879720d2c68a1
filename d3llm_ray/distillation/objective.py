"""The distillation loss: cross-entropy on both views and entropy where the student is already right.

A loss module wraps the transformer, so that one forward of it is one forward of the concatenated views and the LM
head runs on supervised rows only (arXiv:2601.07568, section 3; dParallel's certainty forcing, arXiv:2509.26488).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d3llm_ray.distillation.batches import Batch

EntropyViews = Literal["a", "both"]
FIGURES = ("loss", "ce", "complement", "entropy", "right")


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms. `entropy_views`: LLaDA's recipe sharpens view A only, Dream's both."""

    ce: float
    complement: float
    entropy: float
    entropy_views: EntropyViews
    temperature: float


def token_terms(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: cross-entropy, entropy of softmax(logits / temperature) in nats, and whether argmax is the label.

    `logits` [N, vocab], `labels` [N]; returns three [N] float32 tensors, the last of 0 and 1 without gradient.
    """
    wide = logits.float()
    ce = F.cross_entropy(wide, labels, reduction="none")
    log_p = F.log_softmax(wide / temperature, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return ce, entropy, (wide.argmax(-1) == labels).float()


def masked_mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of `values` where `chosen` is 1, and a 0 that keeps its graph where nothing is chosen."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def combine(
    ce: Tensor, entropy: Tensor, right: Tensor, complement: Tensor, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """The weighted loss and its figures, both from per-token terms [N]; `complement` [N] bool marks view B.

    Every term is a mean over its own tokens of the micro-batch. Figures: [5] float32 without gradient, named by
    `FIGURES`; `right` is the share of supervised tokens whose argmax is the label.
    """
    view_b = complement.float()
    view_a = 1 - view_b
    ce_a, ce_b = masked_mean(ce, view_a), masked_mean(ce, view_b)
    entropy_term = masked_mean(entropy, view_a * right)
    if weights.entropy_views == "both":
        entropy_term = entropy_term + masked_mean(entropy, view_b * right)
    loss = weights.ce * ce_a + weights.complement * ce_b + weights.entropy * entropy_term
    return loss, torch.stack((loss, ce_a, ce_b, entropy_term, right.mean())).detach()


class DistillationLoss(nn.Module):
    """A transformer with its loss on top: `forward(batch) -> (loss, figures)`.

    `model` is a `Transformer` or its peft wrapper. At most `head_rows` rows of logits exist at a time: with a
    vocabulary of 126,464 a thousand float32 rows take half a gigabyte, and the loss needs several of them.
    `autocast` computes in bfloat16 over float32 weights.
    """

    def __init__(self, model: nn.Module, weights: LossWeights, *, head_rows: int, autocast: bool) -> None:
        super().__init__()
        self.model = model
        self.weights = weights
        self.head_rows = head_rows
        self.autocast = autocast

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.autocast(batch.token_ids.device.type, torch.bfloat16, enabled=self.autocast):
            hidden = self.model(batch.token_ids, batch.ragged)  # [T, hidden_size]
            ce, entropy, right = self._terms(hidden[batch.rows], batch.labels)
        return combine(ce, entropy, right, batch.complement, self.weights)

    def _terms(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if len(labels) <= self.head_rows:
            return self._head(hidden, labels)
        # Recomputed in the backward pass, so that no chunk's logits outlive it.
        chunks = zip(torch.split(hidden, self.head_rows), torch.split(labels, self.head_rows), strict=True)
        terms = [checkpoint(self._head, rows, targets, use_reentrant=False) for rows, targets in chunks]
        ce, entropy, right = (torch.cat(parts) for parts in zip(*terms, strict=True))
        return ce, entropy, right

    def _head(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.model.logits(hidden)  # type: ignore[operator]  # peft's wrapper passes unknown names through
        return token_terms(logits, labels, self.weights.temperature)
