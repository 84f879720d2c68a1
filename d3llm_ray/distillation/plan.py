"""What every optimizer step trains on, from the settings and the rows alone: no worker, no state."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from d3llm_ray.distillation.data import TrajectorySet
from d3llm_ray.distillation.objectives import Moment
from d3llm_ray.distillation.objectives.batches import MicroBatch, TrainingSample, epoch_order, pack
from d3llm_ray.distillation.objectives.corruption import draws
from d3llm_ray.distillation.objectives.curriculum import learning_rate
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.errors import require
from d3llm_ray.models.families import Family

VALIDATION_EPOCH = -1  # the held-out rows are drawn once, at the end of the curriculum


class TrainingPlan:
    """All steps of a run. Raises `InputError` when the rows do not fill one batch."""

    def __init__(self, settings: DistillSettings, samples: TrajectorySet, family: Family) -> None:
        accepted = f"at most the number of rows, {len(samples)} with keep: {settings.keep}"
        require(settings.batch_size <= len(samples), "batch_size", settings.batch_size, accepted)
        self.settings = settings
        self.samples = samples
        self.family = family
        self.objective = settings.objective
        self.steps_per_epoch = len(samples) // settings.batch_size
        self.micro_batches_per_step = settings.batch_size // settings.micro_batch_size  # of all workers together
        total = self.steps_per_epoch * settings.epochs
        self.max_steps = total if settings.max_steps is None else min(total, settings.max_steps)
        self._order: tuple[int, NDArray[np.int64]] | None = None  # of the epoch in hand

    def at(self, step: int) -> Moment:
        """The place of a step (0-based) in the run."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        return Moment(epoch, in_epoch, self.steps_per_epoch, step, self.max_steps)

    def lr(self, step: int) -> float:
        """Learning rate of a step (0-based)."""
        settings = self.settings
        return learning_rate(
            step, self.max_steps, peak=settings.lr, schedule=settings.lr_schedule, warmup_ratio=settings.warmup_ratio
        )

    def micro_batch(self, number: int) -> MicroBatch:
        """Micro-batch `number` of the run, counted over all steps and workers; the same on whoever packs it."""
        step, place = divmod(number, self.micro_batches_per_step)
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            settings = self.settings
            order = epoch_order(
                self.samples.lengths,
                settings.seed,
                epoch,
                batch_size=settings.batch_size,
                micro_batch_size=settings.micro_batch_size,
            )
            self._order = epoch, order
        return self._pack([self.samples[int(row)] for row in self._order[1][in_epoch, place]], epoch, self.at(step))

    def numbers(self, first_step: int, rank: int, workers: int) -> range:
        """Numbers of the micro-batches that worker `rank` of `workers` trains on from `first_step` to the end."""
        per_step = self.micro_batches_per_step  # a multiple of `workers`
        return range(first_step * per_step + rank, self.max_steps * per_step, workers)

    def validation(self, samples: TrajectorySet, rank: int, workers: int) -> list[MicroBatch]:
        """One worker's share of the held-out rows, masked once for all validations, as at the end of training."""
        order = np.argsort(samples.lengths, kind="stable")
        size = self.settings.micro_batch_size
        groups = [order[first : first + size] for first in range(0, len(order), size)]
        return [
            self._pack([samples[int(row)] for row in group], VALIDATION_EPOCH, None) for group in groups[rank::workers]
        ]

    def _pack(self, samples: list[TrainingSample], epoch: int, moment: Moment | None) -> MicroBatch:
        seed = self.settings.seed
        views = [
            self.objective.views(draws(seed, epoch, sample.prompt_id), sample, moment, self.family)
            for sample in samples
        ]
        return pack([sample.prompt_id for sample in samples], [sample.prompt_ids.size for sample in samples], views)
