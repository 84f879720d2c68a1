"""From an epoch's order to packed micro-batches: the same ones whatever the number of workers (pure numpy)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
class TrainingSample:
    """One teacher's answer. The response is the whole canvas: stop token and padding are trained as well."""

    prompt_id: str
    prompt_ids: NDArray[np.int32]  # [prompt length]
    response_ids: NDArray[np.int32]  # [canvas]
    reveal_step: NDArray[np.uint16] | None  # [canvas], 0-based teacher step that revealed each position; None: unknown

    def answer_length(self, stop_token_ids: Sequence[int]) -> int:
        """Tokens of the answer up to its stop token; the whole response where it has none."""
        stops = np.flatnonzero(np.isin(self.response_ids, stop_token_ids))
        return int(stops[0]) + 1 if stops.size else self.response_ids.size


@dataclass(frozen=True)
class View:
    """One input row that an objective made of a sample: what is forwarded, and what it has to predict.

    `rows` are the places in `token_ids` whose hidden states predict `labels`; `weights` multiply the tokens' losses.
    """

    token_ids: NDArray[np.int32]  # [length]
    rows: NDArray[np.int64]  # [supervised]
    labels: NDArray[np.int32]  # [supervised]
    weights: NDArray[np.float32]  # [supervised]
    mask_ratio: float  # of the positions that the view trains on


@dataclass(frozen=True)
class MicroBatch:
    """Views packed into one token axis: all samples' first views, then all samples' second ones, if there are any.

    T packed tokens, B views, N supervised tokens. Views of a sample differ in `second` only by their place in it.
    """

    prompt_ids: tuple[str, ...]  # of the samples, for messages
    token_ids: NDArray[np.int32]  # [T]
    lengths: NDArray[np.int64]  # [B]
    prompt_lengths: NDArray[np.int64]  # [B]
    rows: NDArray[np.int64]  # [N] packed places whose hidden states predict `labels`
    labels: NDArray[np.int32]  # [N]
    weights: NDArray[np.float32]  # [N]
    second: NDArray[np.bool_]  # [N] True where a sample's second view is supervised
    mask_ratio: float  # mean over the samples' first views


def pack(prompt_ids: Sequence[str], prompt_lengths: Sequence[int], views: Sequence[Sequence[View]]) -> MicroBatch:
    """Concatenate the views of several samples (each with equally many) into one micro-batch."""
    ordered = [view for place in zip(*views, strict=True) for view in place]  # by place, then by sample
    lengths = np.array([view.token_ids.size for view in ordered], dtype=np.int64)
    first = np.cumsum(lengths) - lengths  # packed place of each view's first token
    supervised = [view.rows.size for view in ordered]
    return MicroBatch(
        prompt_ids=tuple(prompt_ids),
        token_ids=np.concatenate([view.token_ids for view in ordered]),
        lengths=lengths,
        prompt_lengths=np.tile(np.asarray(prompt_lengths, dtype=np.int64), len(views[0])),
        rows=np.concatenate([start + view.rows for start, view in zip(first, ordered, strict=True)]),
        labels=np.concatenate([view.labels for view in ordered]),
        weights=np.concatenate([view.weights for view in ordered]),
        second=np.repeat(np.arange(len(ordered)) >= len(views), supervised),
        mask_ratio=float(np.mean([sample[0].mask_ratio for sample in views])),
    )
