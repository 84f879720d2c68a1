"""Token statistics in plain torch: what the LM head's rows say, and the draws of sampled rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from d3llm_ray.decoding.sampling import Sampling, filter_logits, gumbel_noise

NEVER = -1e9  # logit of a token that must not be predicted; finite, so that 0 * NEVER stays 0


def score(logits: Tensor, mask_id: int | None, *, margins: bool) -> Tensor:
    """Statistics of softmax(logits): [N, V] float32 -> [3 or 4, N] float32.

    Rows: argmax (lowest id on ties), its log probability, entropy in nats and, with `margins`, the gap between
    the two highest probabilities. The mask token is never predicted: its logits are overwritten in place. The
    entropy of a row that holds NaN or an infinity is NaN. Token ids below 2^24 are exact in float32.
    """
    if mask_id is not None and mask_id < logits.shape[1]:
        logits[:, mask_id] = NEVER
    top, argmax = logits.max(dim=-1)
    shifted = logits - top[:, None]
    exponentials = shifted.exp()
    total = exponentials.sum(dim=-1)
    log_total = total.log()
    entropy = log_total - (exponentials * shifted).sum(dim=-1) / total
    columns = [argmax.float(), -log_total, entropy]
    if margins:
        columns.append(_gap(exponentials) / total)
    return torch.stack(columns)


def draw(logits: Tensor, mask_id: int | None, base: Tensor, sampling: Sampling) -> Tensor:
    """Statistics of the sampling distribution: [M, V] float32 -> [7, M] float32, in the layout of `base`.

    Rows: argmax, log probability of the sampled token before temperature and filters, entropy likewise; then of
    the distribution after them: margin, sampled token, its probability, entropy. `base` [7, M] holds them for any
    sampled token. Temperature comes first, then top-p, then top-k; tokens are drawn by the Gumbel-max rule in
    float64 (LLaDA generate.py; same distribution as Dream's multinomial). Rows at temperature 0 take the argmax,
    and 1 as temperature.
    """

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(logits.device, non_blocking=True)

    temperatures = put(sampling.temperatures).double()
    hot = temperatures > 0
    tempered = logits.double() / torch.where(hot, temperatures, 1.0)[:, None]
    if mask_id is not None and mask_id < logits.shape[1]:
        tempered[:, mask_id] = -torch.inf  # NEVER would come back at a temperature near 1e9
    argmax = base[0].long()
    if sampling.filtered.any():
        tempered = filter_logits(tempered, put(sampling.top_ps), put(sampling.top_ks))
    sampled = argmax
    if (sampling.temperatures > 0).any():
        noise = gumbel_noise(put(sampling.keys.view(np.int64)), logits.shape[1])
        sampled = torch.where(hot, (tempered + noise).argmax(dim=-1), argmax)
    gap = logits.gather(1, torch.stack((sampled, base[4].long()), dim=1))
    probabilities = tempered.softmax(dim=-1)
    columns = (
        argmax,
        base[1] + gap[:, 0] - gap[:, 1],
        base[2],
        _gap(probabilities),
        sampled,
        probabilities.gather(1, sampled[:, None])[:, 0],
        torch.special.entr(probabilities).sum(dim=-1),
    )
    return torch.stack([column.float() for column in columns])


def _gap(weights: Tensor) -> Tensor:
    top = weights.topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]
