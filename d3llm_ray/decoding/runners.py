"""Runners: from a step's batch to the statistics of its scored rows. `benchmark.profile` wraps one to measure it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from d3llm_ray.decoding.batch import ModelCall, StepBatch
from d3llm_ray.decoding.statistics import TokenStatistics, token_statistics
from d3llm_ray.models import KVCache, Transformer


class Runner(Protocol):
    """Runs what a step has planned. The two halves are called one after the other, for the same batch."""

    def forward(self, batch: StepBatch) -> Tensor:
        """All model calls of the batch; a tensor that `statistics` understands."""

    def statistics(self, batch: StepBatch, computed: Tensor) -> TokenStatistics:
        """Figures of the scored rows, on the host, in the order of `batch.spans`."""


@torch.inference_mode()
def run(runner: Runner, batch: StepBatch) -> TokenStatistics:
    """Both halves of a runner."""
    return runner.statistics(batch, runner.forward(batch))


class EagerRunner:
    """Layouts of any shape, kernel by kernel.

    `vocabulary` is the number of ids that have a token; ids from there on and `mask_id` are never predicted.
    """

    def __init__(self, model: Transformer, cache: KVCache, vocabulary: int, mask_id: int | None) -> None:
        self.model, self.cache, self.vocabulary, self.mask_id = model, cache, vocabulary, mask_id

    def calls(self, batch: StepBatch) -> list[ModelCall]:
        """The batch's model calls, on the device."""
        return [ModelCall.of(group, self.cache, self.cache.device) for group in batch.groups]

    def compute(self, calls: Sequence[ModelCall]) -> Tensor:
        """Hidden states of the calls' scored rows, [N, hidden_size]."""
        hidden = [self.model(*call) for call in calls]
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def forward(self, batch: StepBatch) -> Tensor:
        return self.compute(self.calls(batch))

    def statistics(self, batch: StepBatch, computed: Tensor) -> TokenStatistics:
        guidance, hidden, unconditional = batch.guidance(), computed, None
        if guidance is not None:
            conditional, twins, scales = guidance
            hidden, unconditional = computed[conditional], (computed[twins], scales)
        return token_statistics(
            self.model,
            hidden,
            vocabulary=self.vocabulary,
            mask_id=self.mask_id,
            sampling=batch.sampling,
            guidance=unconditional,
            margins=batch.margins,
            tops=batch.tops,
        )
