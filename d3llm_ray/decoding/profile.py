"""Where an engine's time goes, and how much work its forwards had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from time import perf_counter

import torch

from d3llm_ray.decoding.batch import Span


@dataclass
class StepProfile:
    """Sums since the last `reset`. Times in seconds; on CUDA they mean what they say with `synchronise` only."""

    plan: float = 0.0
    forward: float = 0.0
    statistics: float = 0.0
    update: float = 0.0
    forwards: int = 0  # model calls
    rows: int = 0  # sequences x forwards
    window_tokens: int = 0  # positions computed
    attended: int = 0  # window length x key length, summed over rows
    key_positions: int = 0  # key length, summed over rows
    scored_rows: int = 0  # rows of the LM head
    synchronise: bool = False

    def reset(self) -> None:
        for field in fields(self):
            if field.name != "synchronise":
                setattr(self, field.name, field.default)

    def count(self, calls: Sequence[Sequence[Span]]) -> None:
        """Add the work of a step's model calls, without what padding adds to it."""
        self.forwards += len(calls)
        for one in (one for call in calls for one in call):
            self.rows += 1
            self.window_tokens += len(one.tokens)
            self.key_positions += one.window.key_length
            self.attended += len(one.tokens) * one.window.key_length
            self.scored_rows += len(one.scored)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase `name`."""
        began = perf_counter()
        yield
        if self.synchronise and torch.cuda.is_available():
            torch.cuda.synchronize()
        setattr(self, name, getattr(self, name) + perf_counter() - began)
