"""Rows in which one token is almost certain, with float64's word on them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def near_certain() -> tuple[Tensor, np.ndarray, np.ndarray]:
    """12 rows whose best token has a probability of 1 - 1e-2 to 1 - 1e-20, in no order, their log probability and
    entropy in float64. All but the first few are 1 in float32."""
    logits = torch.randn(12, 189, generator=torch.Generator().manual_seed(3)) / 5
    logits[range(12), range(5, 17)] = torch.tensor([30, 12, 50, 9, 21, 26, 18, 40, 33.5, 15, 23.7, 45])
    wide = logits.double().numpy()
    rest = np.exp(wide - wide.max(axis=1, keepdims=True))
    rest[range(12), range(5, 17)] = 0
    logprob = -np.log1p(rest.sum(axis=1))
    entropy = -logprob - (rest * (wide - wide.max(axis=1, keepdims=True))).sum(axis=1) / (1 + rest.sum(axis=1))
    return logits, logprob, entropy
