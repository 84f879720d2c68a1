"""Losses of the three stages: next token, masked tokens under two masks, and the sum of a bare equation."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from d3llm_ray.models import BlockCausal, Family, Ragged, Transformer
from pretraining.corpus import Example

EPSILON = 1e-3  # smallest mask ratio of LLaDA's objective
OPERANDS = 4  # tokens before a sum: a + n =


def causal_loss(model: Transformer, rows: list[list[int]], first: list[int], device: str) -> Tensor:
    """Mean next-token cross-entropy over each row's tokens from position `first` on."""
    ids = torch.tensor([token for row in rows for token in row], device=device)
    ragged = Ragged.build([len(row) for row in rows], pattern=BlockCausal(1), device=device)
    predicted = (ragged.positions >= torch.tensor(first, device=device)[ragged.rows]).nonzero()[:, 0]
    hidden = model(ids, ragged)
    return F.cross_entropy(model.logits(hidden[predicted - 1]).float(), ids[predicted])


def masked_losses(model: Transformer, family: Family, ids: Tensor, masked: Tensor, ragged: Ragged) -> Tensor:
    """Cross-entropy of every masked token, [number of masked tokens]; no row may be masked at its start."""
    assert family.mask_token_id is not None
    hidden = model(ids.masked_fill(masked, family.mask_token_id), ragged)
    rows = masked.nonzero()[:, 0] - int(family.logit_shift)
    return F.cross_entropy(model.logits(hidden[rows]).float(), ids[masked], reduction="none")


def fact_loss(model: Transformer, family: Family, facts: list[list[int]], device: str) -> Tensor:
    """Mean cross-entropy of the last token of each fact, the sum, alone masked."""
    ids = torch.tensor([token for fact in facts for token in fact], device=device)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked[torch.tensor([len(fact) for fact in facts], device=device).cumsum(0) - 1] = True
    return masked_losses(model, family, ids, masked, Ragged.build([len(fact) for fact in facts], device=device)).mean()


def diffusion_loss(
    model: Transformer, family: Family, examples: list[Example], canvas: int, stage: str, device: str
) -> Tensor:
    """Masked cross-entropy of each example under two masks.

    The first mask is i.i.d. with a ratio p ~ U(0, 1). In stage `sft` the second is its complement, and LLaDA's
    objective is used: each token's loss over ratio x canvas length, averaged over rows (both views are draws of
    it: p and 1 - p are equally distributed). In stage `adapt` the second is a `targeted_mask`, and the loss is the
    mean over masked tokens plus the mean over the targets.
    """
    half = len(examples)
    clean = [[*e.prompt, *e.response, *[family.eos_token_id] * (canvas - len(e.response))] for e in examples] * 2
    tokens = torch.tensor([token for row in clean for token in row], device=device)
    ragged = Ragged.build([len(row) for row in clean], device=device)
    # Stratified over the batch: the same uniform marginal with less variance.
    t = (torch.arange(half) + torch.rand(half)) / half
    ratio = (1 - EPSILON) * t[torch.randperm(half)] + EPSILON
    drawn = torch.rand(half, canvas) < ratio[:, None]
    targeted = [targeted_mask(example, canvas) for example in examples]
    second = torch.stack([mask for mask, _ in targeted]) if stage == "adapt" else ~drawn
    masks = torch.cat((drawn, second))  # [2 * half, canvas]
    prompts = torch.tensor([len(e.prompt) for e in examples] * 2, device=device)
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[ragged.positions >= prompts[ragged.rows]] = masks.flatten().to(device)
    losses = masked_losses(model, family, tokens, masked, ragged)
    if stage == "adapt":
        order = masks.flatten().cumsum(0).view_as(masks) - 1  # of each masked position among the losses
        targets = order[half:].gather(1, torch.tensor([[target] for _, target in targeted]))[:, 0]
        return losses.mean() + losses[targets.to(device)].mean()
    ratios = torch.cat((ratio, (1 - ratio).clamp(min=EPSILON))).to(device)
    return (losses / (ratios[ragged.rows[masked]] * canvas)).sum() / len(clean)


def targeted_mask(example: Example, canvas: int) -> tuple[Tensor, int]:
    """A mask [canvas] and one masked response position that it leaves predictable.

    I.i.d. masks seldom hide a sum and show both its operands, so that arithmetic comes far behind the text around
    it, as does a function's name behind the words that every function has. Half of these masks hide everything from
    a position on, as decoding from left to right does (any position, or a target: targets alone would teach that what
    is masked first is one); the other half are i.i.d. but for one target, hidden, and what stands before it, shown.
    """
    chosen = random.choice(example.targets)
    if random.random() < 0.5:
        target = chosen if random.random() < 0.5 else random.randrange(len(example.response))
        return torch.arange(canvas) >= target, target
    mask = torch.rand(canvas) < random.random()
    mask[max(0, chosen - OPERANDS) : chosen] = False
    mask[chosen] = True
    return mask, chosen
