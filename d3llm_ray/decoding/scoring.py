"""Token statistics in plain torch: what the LM head's rows say, and the draws of sampled rows."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from d3llm_ray.decoding.sampling import Sampling, filter_logits, gumbel_noise


class Stat(IntEnum):
    """Rows of packed statistics, [rows, N] float32. Token ids below 2^24 are exact in it.

    The first four are of softmax(logits), the others of the distribution after temperature, top-p and top-k; a batch in
    which every row is greedy has only the first ones. Of a drawn row `LOGPROB` is the sampled token's and `MARGIN` is
    of the filtered distribution.
    """

    ARGMAX = 0  # the lowest id on ties
    LOGPROB = 1  # of the argmax; ranks near-certain tokens, whose probabilities are all 1 in float32
    ENTROPY = 2  # nats; NaN for a row that holds NaN or an infinity
    MARGIN = 3  # gap between the two highest probabilities; NaN where nobody asked for it
    SAMPLED = 4
    FILTERED_CONFIDENCE = 5  # probability of the sampled token
    FILTERED_ENTROPY = 6


GREEDY_STATS = Stat.SAMPLED  # so many rows where nothing is sampled

NEVER = -1e9  # logit of a token that must not be predicted; finite, so that 0 * NEVER stays 0


def score(logits: Tensor, mask_id: int | None, *, margins: bool) -> Tensor:
    """Statistics of softmax(logits): [N, V] float32 -> [GREEDY_STATS, N] float32, rows as in `Stat`.

    The mask token is never predicted: its logits are overwritten in place. Without `margins` that row is NaN.
    """
    if mask_id is not None and mask_id < logits.shape[1]:
        logits[:, mask_id] = NEVER
    top, argmax = logits.max(dim=-1)
    shifted = logits - top[:, None]
    others = shifted.exp().scatter_(1, argmax[:, None], 0.0)  # 1 + others would lose what separates near-certain tokens
    rest = others.sum(dim=-1)
    log_total = rest.log1p()
    entropy = log_total - (others * shifted).sum(dim=-1) / (1 + rest)
    margin = (1 - others.amax(dim=-1)) / (1 + rest) if margins else torch.full_like(entropy, torch.nan)
    return torch.stack((argmax.float(), -log_total, entropy, margin))


def most_probable(logits: Tensor, mask_id: int | None, count: int) -> Tensor:
    """[2 * count, N] float32 of [N, V]: ids of the most probable tokens, then their log probabilities."""
    logits = logits.double()
    if mask_id is not None and mask_id < logits.shape[1]:
        logits[:, mask_id] = NEVER
    top = logits.log_softmax(dim=-1).topk(count, dim=-1)
    return torch.cat((top.indices, top.values), dim=1).float().T


def as_sampled(greedy: Tensor) -> Tensor:
    """All rows of `Stat` for rows that take their most probable token: [GREEDY_STATS, N] -> [len(Stat), N]."""
    sampled, confidence, entropy = greedy[Stat.ARGMAX], greedy[Stat.LOGPROB].exp(), greedy[Stat.ENTROPY]
    return torch.cat((greedy, torch.stack((sampled, confidence, entropy))))


def draw(logits: Tensor, mask_id: int | None, base: Tensor, sampling: Sampling) -> Tensor:
    """Statistics of the sampling distribution: [M, V] float32 -> [len(Stat), M] float32, rows as in `Stat`.

    `base` [len(Stat), M] holds them for any sampled token. Temperature comes first, then top-p, then top-k; tokens are
    drawn by the Gumbel-max rule in float64 (LLaDA generate.py; same distribution as Dream's multinomial). Rows at
    temperature 0 take the argmax, and 1 as temperature.
    """

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(logits.device, non_blocking=True)

    temperatures = put(sampling.temperatures).double()
    hot = temperatures > 0
    tempered = logits.double() / torch.where(hot, temperatures, 1.0)[:, None]
    if mask_id is not None and mask_id < logits.shape[1]:
        tempered[:, mask_id] = -torch.inf  # NEVER would come back at a temperature near 1e9
    argmax = base[Stat.ARGMAX].long()
    if sampling.filtered.any():
        tempered = filter_logits(tempered, put(sampling.top_ps), put(sampling.top_ks))
    sampled = argmax
    if (sampling.temperatures > 0).any():
        noise = gumbel_noise(put(sampling.keys.view(np.int64)), logits.shape[1])
        sampled = torch.where(hot, (tempered + noise).argmax(dim=-1), argmax)
    gap = logits.gather(1, torch.stack((sampled, base[Stat.SAMPLED].long()), dim=1))
    probabilities = tempered.softmax(dim=-1)
    top = probabilities.topk(2, dim=-1).values
    values = {
        Stat.ARGMAX: argmax,
        Stat.LOGPROB: base[Stat.LOGPROB] + (gap[:, 0] - gap[:, 1]),  # exact where both are one token
        Stat.ENTROPY: base[Stat.ENTROPY],
        Stat.MARGIN: top[:, 0] - top[:, 1],
        Stat.SAMPLED: sampled,
        Stat.FILTERED_CONFIDENCE: probabilities.gather(1, sampled[:, None])[:, 0],
        Stat.FILTERED_ENTROPY: torch.special.entr(probabilities).sum(dim=-1),
    }
    return torch.stack([values[stat].float() for stat in Stat])
