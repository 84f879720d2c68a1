"""A wrapper of an engine's runner that tells the metrics how much of the requests' canvases is computed anew."""

from __future__ import annotations

from torch import Tensor

from d3llm_ray.decoding.batch import StepBatch
from d3llm_ray.decoding.runners import Runner
from d3llm_ray.decoding.statistics import TokenStatistics
from d3llm_ray.metrics import ServingMetrics


class CountedRunner:
    """Counts the sequences of each forward: those computed from the prompt's first token on, and those behind a cache.

    The first forward of a request is of the former kind, and so are refreshes, the forwards of a cache's delay and all
    forwards without a cache.
    """

    def __init__(self, runner: Runner, metrics: ServingMetrics) -> None:
        self._runner, self._metrics = runner, metrics

    def forward(self, batch: StepBatch) -> Tensor:
        spans = batch.spans
        full = sum(span.window.start == 0 for span in spans)
        self._metrics.computed(full, len(spans) - full)
        return self._runner.forward(batch)

    def statistics(self, batch: StepBatch, computed: Tensor) -> TokenStatistics:
        return self._runner.statistics(batch, computed)
