"""Wrappers of an engine's runner: where a step's time goes, how much work it had, and its model calls for replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d3llm_ray.decoding.batch import ModelCall, StepBatch
from d3llm_ray.decoding.request import Event
from d3llm_ray.decoding.runners import EagerRunner, Runner
from d3llm_ray.decoding.statistics import TokenStatistics
from d3llm_ray.device import synchronise
from d3llm_ray.models import Work

if TYPE_CHECKING:
    from d3llm_ray.decoding.engine import Engine

PHASES = ("plan", "forward", "statistics", "update")


class StepProfile:
    """A runner around an engine's own: seconds by phase and work, summed over the steps taken through `step`.

    The device is waited for behind each phase. In static shapes the statistics are part of the forward.
    """

    def __init__(self, runner: Runner, device: torch.device) -> None:
        self._runner, self._device = runner, device
        self._since = 0.0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.forwards = 0  # model calls
        self.rows = 0  # sequences x forwards
        self.work = Work(0, 0, 0, 0)  # without what padding adds to it

    def step(self, engine: Engine) -> list[Event]:
        """One step of an engine whose runner this is."""
        self._since = perf_counter()
        events = engine.step()
        self._lap("update")
        return events

    def forward(self, batch: StepBatch) -> Tensor:
        self._lap("plan")
        computed = self._runner.forward(batch)
        self._lap("forward")
        self._count(batch)
        return computed

    def statistics(self, batch: StepBatch, computed: Tensor) -> TokenStatistics:
        statistics = self._runner.statistics(batch, computed)
        self._lap("statistics")
        return statistics

    def _lap(self, phase: str) -> None:
        synchronise(self._device)
        now = perf_counter()
        self.seconds[phase] += now - self._since
        self._since = now

    def _count(self, batch: StepBatch) -> None:
        self.forwards += len(batch.groups)
        for span in (span for group in batch.groups for span in group):
            length, keys = len(span.tokens), span.window.key_length
            self.rows += 1
            self.work += Work(length, length * keys, keys, len(span.scored))
        self._since = perf_counter()


class CapturingRunner:
    """An eager runner that keeps its model calls, so that a benchmark can replay them."""

    def __init__(self, runner: EagerRunner) -> None:
        self._runner = runner
        self.calls: list[ModelCall] = []

    def forward(self, batch: StepBatch) -> Tensor:
        calls = self._runner.calls(batch)
        self.calls += calls
        return self._runner.compute(calls)

    def statistics(self, batch: StepBatch, computed: Tensor) -> TokenStatistics:
        return self._runner.statistics(batch, computed)


@contextmanager
def profiled(engine: Engine) -> Iterator[StepProfile]:
    """Measure the steps that the block takes through `StepProfile.step`."""
    runner = engine.runner
    profile = StepProfile(runner, engine.device)
    engine.runner = profile
    try:
        yield profile
    finally:
        engine.runner = runner
