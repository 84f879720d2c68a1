"""What every optimizer step trains on, from the settings and the rows alone: no worker, no state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from d3llm_ray.distillation.batches import Batch, epoch_order, pack
from d3llm_ray.distillation.corruption import Views, choose_views, draw_window, generator
from d3llm_ray.distillation.curriculum import learning_rate, noise_floor, window_size
from d3llm_ray.distillation.data import Sample, TrajectorySet
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.errors import require
from d3llm_ray.models.families import Family


@dataclass(frozen=True)
class Scheduled:
    """The scheduled values of one optimizer step."""

    epoch: int
    window: int
    noise_floor: float
    lr: float


class Plan:
    """All steps of a run. Raises `InputError` when the rows do not fill one batch."""

    def __init__(self, settings: DistillSettings, samples: TrajectorySet) -> None:
        accepted = f"at most the number of rows, {len(samples)} with keep: {settings.keep}"
        require(settings.batch_size <= len(samples), "batch_size", settings.batch_size, accepted)
        self.settings = settings
        self.samples = samples
        self.steps_per_epoch = len(samples) // settings.batch_size
        total = self.steps_per_epoch * settings.epochs
        self.max_steps = total if settings.max_steps is None else min(total, settings.max_steps)
        self._order: tuple[int, NDArray[np.int64]] | None = None  # of the epoch in hand

    def at(self, step: int) -> Scheduled:
        """Window, noise floor and learning rate of a step (0-based)."""
        settings = self.settings
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        return Scheduled(
            epoch=epoch,
            window=window_size(settings.window_sizes, epoch, in_epoch, self.steps_per_epoch),
            noise_floor=noise_floor(settings.noise_start, settings.noise_end, step, self.max_steps),
            lr=learning_rate(
                step,
                self.max_steps,
                peak=settings.lr,
                schedule=settings.lr_schedule,
                warmup_ratio=settings.warmup_ratio,
            ),
        )

    def rows(self, step: int, rank: int, workers: int) -> NDArray[np.int64]:
        """Row indices of one worker's micro-batches in a step: [accumulation, micro_batch_size]."""
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
        return self._order[1][in_epoch, rank::workers]

    def views(self, sample: Sample, step: int) -> Views:
        """The window and masks of a sample in a step: its own draw from (seed, epoch, prompt_id)."""
        scheduled, settings = self.at(step), self.settings
        rng = generator(settings.seed, scheduled.epoch, sample.prompt_id)
        canvas = sample.response_ids.size
        window = draw_window(rng, canvas, scheduled.window, scheduled.noise_floor, settings.noise_max)
        return choose_views(rng, sample.reveal_step, window, order=settings.order, rounding=settings.ratio_rounding)

    def micro_batches(
        self, step: int, rank: int, workers: int, family: Family, device: torch.device | str = "cpu"
    ) -> Iterator[Batch]:
        """One worker's packed micro-batches of a step."""
        for rows in self.rows(step, rank, workers):
            samples = [self.samples[int(row)] for row in rows]
            views = [self.views(sample, step) for sample in samples]
            yield pack(samples, views, family, both=self.settings.complement_weight > 0, device=device)
