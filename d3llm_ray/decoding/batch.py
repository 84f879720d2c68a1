"""From planned rows to model calls: a step's sequences in groups, and the rows of each that are scored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d3llm_ray.decoding.canvas import FloatArray, IntArray
from d3llm_ray.decoding.contracts import Window
from d3llm_ray.decoding.sampling import Sampling
from d3llm_ray.models import KVCache, Ragged


@dataclass(frozen=True)
class Grouping:
    """How a step's sequences share model calls.

    On a CPU a group of similar windows that fits its caches beats one large padded rectangle.
    """

    most_tokens: int  # packed, of one model call
    longest_over_shortest: float = math.inf  # window of a group, above `slack` tokens
    slack: int = 0

    @staticmethod
    def on(device: torch.device) -> Grouping:
        """What suits a device."""
        return Grouping(16384) if device.type == "cuda" else Grouping(512, longest_over_shortest=1.5, slack=8)


@dataclass(slots=True)  # not frozen: made for every request in every forward
class Span:
    """One sequence of a forward: a request's canvas, or its unconditional twin."""

    row: int  # index of the request in the batch
    tokens: IntArray  # of the window
    window: Window
    base: int | None  # place in the KV pool; None computes without a cache
    scored: IntArray  # rows of the window whose logits are wanted
    guidance: float = 0.0  # scale of classifier-free guidance
    twin: bool = False  # the sequence of classifier-free guidance whose prompt is masked


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What a step computes: groups of sequences that share a model call, and how their scored rows are read."""

    groups: list[list[Span]]
    sampling: Sampling | None = None  # of the scored rows without the twins'; None: all take their most probable token
    margins: bool = False  # whether a selection reads the margin
    tops: int = 0  # most probable tokens a row that a request wants to know of

    @property
    def spans(self) -> list[Span]:
        """The sequences in the order of their scored rows, twins left out."""
        return [span for group in self.groups for span in group if not span.twin]

    def guidance(self) -> tuple[list[int], list[int], FloatArray] | None:
        """Places of the scored rows without those of twins, of their twins' (the row itself where there is none), and
        scales; None when no sequence is guided."""
        spans = [span for group in self.groups for span in group]
        if not any(span.twin for span in spans):
            return None
        ends = np.cumsum([len(span.scored) for span in spans])
        places = {
            (span.row, span.twin): range(end - len(span.scored), end) for span, end in zip(spans, ends, strict=True)
        }
        plain = [span for span in spans if not span.twin]
        conditional = [place for span in plain for place in places[span.row, False]]
        twins = [place for span in plain for place in places.get((span.row, True), places[span.row, False])]
        scales = np.repeat([span.guidance for span in plain], [len(span.scored) for span in plain])
        return conditional, twins, scales.astype(np.float32)


class ModelCall(NamedTuple):
    """The arguments of one model call, on its device."""

    token_ids: Tensor  # [T]
    layout: Ragged
    cache: KVCache | None
    scored: Tensor  # [N] int64, packed places

    @staticmethod
    def of(spans: Sequence[Span], cache: KVCache, device: torch.device) -> ModelCall:
        """Lay out sequences of which all or none use the cache."""
        windows = [span.window for span in spans]
        bases = [span.base for span in spans if span.base is not None]
        layout = Ragged.build(
            [window.end - window.start for window in windows],
            [window.start for window in windows],
            [window.key_length for window in windows],
            patterns=[window.pattern for window in windows],
            bases=bases or None,
            device=device,
        )
        offset, scored = 0, []
        for span in spans:
            scored.append(span.scored + offset)
            offset += len(span.tokens)
        tokens = np.concatenate([span.tokens for span in spans])
        return ModelCall(
            torch.from_numpy(tokens).to(device, non_blocking=True),
            layout,
            cache if bases else None,
            torch.from_numpy(np.concatenate(scored)).to(device, non_blocking=True),
        )


def grouped(spans: Sequence[Span], grouping: Grouping) -> Iterator[list[Span]]:
    """Split a step's sequences into model calls; those with and without a cache are kept apart."""
    if len(spans) == 1:
        yield list(spans)
        return
    group: list[Span] = []
    tokens = 0
    for span in sorted(spans, key=lambda span: (span.base is None, len(span.tokens), span.window.key_length)):
        length = len(span.tokens)
        if group:
            first = group[0]
            uneven = length > grouping.longest_over_shortest * len(first.tokens) + grouping.slack
            if uneven or tokens + length > grouping.most_tokens or (first.base is None) != (span.base is None):
                yield group
                group, tokens = [], 0
        group.append(span)
        tokens += length
    if group:
        yield group
