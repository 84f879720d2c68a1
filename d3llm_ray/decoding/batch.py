"""From planned rows to forwards: sequences packed into groups, and the rows of each that are scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d3llm_ray.decoding.caches import Window
from d3llm_ray.decoding.canvas import IntArray
from d3llm_ray.models import Ragged

# On a CPU a group of similar windows that fits its caches beats one large padded rectangle.
CPU_GROUP_TOKENS = 512
CPU_LONGEST_OVER_SHORTEST = 1.5
CPU_SLACK_TOKENS = 8
CUDA_GROUP_TOKENS = 16384


@dataclass(frozen=True)
class Span:
    """One sequence of a forward: a request's canvas, or its unconditional twin."""

    row: int  # index of the request in the batch
    tokens: IntArray  # of the window
    window: Window
    base: int | None  # place in the KV pool; None computes without a cache
    scored: IntArray  # rows of the window whose logits are wanted
    twin: bool = False  # the sequence of classifier-free guidance whose prompt is masked


@dataclass(frozen=True)
class Group:
    """Sequences that share a model call."""

    sequences: list[Span]
    token_ids: Tensor  # [T]
    ragged: Ragged
    scored: Tensor  # [N] int64, packed

    @staticmethod
    def build(sequences: list[Span], device: torch.device) -> Group:
        windows = [sequence.window for sequence in sequences]
        bases = [sequence.base for sequence in sequences if sequence.base is not None]
        ragged = Ragged.build(
            [window.end - window.start for window in windows],
            [window.start for window in windows],
            [window.key_length for window in windows],
            patterns=[window.pattern for window in windows],
            bases=bases or None,
            device=device,
        )
        offset, scored = 0, []
        for sequence in sequences:
            scored.append(sequence.scored + offset)
            offset += len(sequence.tokens)
        tokens = np.concatenate([sequence.tokens for sequence in sequences])
        return Group(
            sequences,
            torch.from_numpy(tokens).to(device, non_blocking=True),
            ragged,
            torch.from_numpy(np.concatenate(scored)).to(device, non_blocking=True),
        )


def max_group_tokens(device: torch.device) -> int:
    """Most packed tokens of one model call."""
    return CUDA_GROUP_TOKENS if device.type == "cuda" else CPU_GROUP_TOKENS


def groups(sequences: Sequence[Span], device: torch.device, limit: int) -> Iterator[list[Span]]:
    """Split a step's sequences into model calls of at most `limit` tokens (or one sequence).

    Those with and without a cache are kept apart, and on a CPU also windows of different lengths.
    """
    ordered = sorted(sequences, key=lambda one: (one.base is None, len(one.tokens), one.window.key_length))
    group: list[Span] = []
    tokens = 0
    for sequence in ordered:
        length = len(sequence.tokens)
        if group:
            first = group[0]
            uneven = device.type == "cpu" and length > CPU_LONGEST_OVER_SHORTEST * len(first.tokens) + CPU_SLACK_TOKENS
            if uneven or tokens + length > limit or (first.base is None) != (sequence.base is None):
                yield group
                group, tokens = [], 0
        group.append(sequence)
        tokens += length
    if group:
        yield group


def guided_rows(sequences: Sequence[Span]) -> tuple[list[int], list[int], list[int]]:
    """Places of a step's scored rows without those of twins, of their twins' (their own where none is), and their
    requests' indices."""
    ends = np.cumsum([len(one.scored) for one in sequences])
    places = {(one.row, one.twin): range(end - len(one.scored), end) for one, end in zip(sequences, ends, strict=True)}
    own = [one.row for one in sequences if not one.twin]
    conditional = [place for row in own for place in places[row, False]]
    twins = [place for row in own for place in places.get((row, True), places[row, False])]
    return conditional, twins, [row for row in own for _ in places[row, False]]
