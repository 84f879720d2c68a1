"""From an epoch's order to packed micro-batches: the same ones whatever the number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d3llm_ray.distillation.corruption import Views, corrupted
from d3llm_ray.distillation.data import Sample
from d3llm_ray.models.families import Family
from d3llm_ray.models.ragged import Ragged

GROUPED_BATCHES = 50  # lengths are sorted within so many batches: wide enough to match, narrow enough to stay random


def epoch_order(
    lengths: NDArray[np.integer], seed: int, epoch: int, *, batch_size: int, micro_batch_size: int
) -> NDArray[np.int64]:
    """Sample indices of one epoch: [steps, micro-batches a step, micro_batch_size].

    A random order, dealt into micro-batches of (nearly) equal `lengths` [N] in random order. The samples that do not
    fill a batch, others in every epoch, are left out. Worker w of W takes the micro-batches w, w + W, ... of a step.
    """
    rng = np.random.default_rng((seed, epoch))
    steps = len(lengths) // batch_size
    order = rng.permutation(len(lengths))[: steps * batch_size]
    width = GROUPED_BATCHES * batch_size
    groups = (order[first : first + width] for first in range(0, order.size, width))
    grouped = np.concatenate([group[np.argsort(lengths[group], kind="stable")] for group in groups])
    micro_batches = rng.permutation(grouped.reshape(-1, micro_batch_size))
    return micro_batches.reshape(steps, -1, micro_batch_size)


@dataclass(frozen=True)
class Batch:
    """One packed micro-batch: all samples' view A, then (unless left out) all samples' view B.

    T packed tokens, N supervised tokens. `rows` are the packed positions whose hidden states predict `labels`.
    """

    token_ids: Tensor  # [T] int64
    ragged: Ragged
    rows: Tensor  # [N] int64
    labels: Tensor  # [N] int64
    complement: Tensor  # [N] bool, True where view B is supervised
    mask_ratio: float  # mean share of the window that view A masks


def pack(
    samples: Sequence[Sample], views: Sequence[Views], family: Family, *, both: bool, device: torch.device | str = "cpu"
) -> Batch:
    """Concatenate the samples' views into one batch; `both=False` leaves view B out."""
    assert family.mask_token_id is not None, "a causal model has no masked views"
    ids, lengths, rows, labels, complement = [], [], [], [], []
    shift = int(family.logit_shift)  # Dream: the hidden state of position p - 1 predicts p
    first = 0
    for is_b in (False, True) if both else (False,):
        for sample, view in zip(samples, views, strict=True):
            chosen = view.complement if is_b else view.masked
            ids += [sample.prompt_ids, corrupted(sample.response_ids, view.window, chosen, family.mask_token_id)]
            lengths.append(sample.length)
            rows.append(first + sample.prompt_ids.size + chosen - shift)
            labels.append(sample.response_ids[chosen])
            complement.append(np.full(chosen.size, is_b))
            first += sample.length
    ratios = [view.masked.size / (view.window.end - view.window.start) for view in views]
    return Batch(
        token_ids=_tensor(ids, np.int64, device),
        ragged=Ragged.build(lengths, device=device),
        rows=_tensor(rows, np.int64, device),
        labels=_tensor(labels, np.int64, device),
        complement=_tensor(complement, np.bool_, device),
        mask_ratio=sum(ratios) / len(ratios),
    )


def _tensor(parts: Sequence[NDArray[np.generic]], dtype: type[np.generic], device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype)).to(device)
