"""What changes while a student trains: window, noise floor and learning rate (arXiv:2601.07568; pure functions)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

LearningRateSchedule = Literal["constant", "cosine"]


def window_size(sizes: Sequence[int], epoch: int, step: int, steps_per_epoch: int) -> int:
    """Window curriculum: tokens in a training window at `step` (0-based) of `epoch` (0-based).

    Linear from `sizes[epoch]` to `sizes[epoch + 1]` by the epoch's fraction, rounded down; the last epoch, and any
    beyond the list, keep the last size. Whole-number arithmetic: a size is reached at the same step everywhere.
    """
    here, there = sizes[min(epoch, len(sizes) - 1)], sizes[min(epoch + 1, len(sizes) - 1)]
    return here + (there - here) * step // steps_per_epoch


def noise_floor(start: float, end: float, step: int, max_steps: int) -> float:
    """Noise curriculum: smallest mask ratio at `step` of `max_steps`: linear from `start` to `end`."""
    return start + (end - start) * min(step / max_steps, 1.0)


def learning_rate(
    step: int, max_steps: int, *, peak: float, schedule: LearningRateSchedule, warmup_ratio: float
) -> float:
    """Rate of `step` (0-based): linear warm-up over `warmup_ratio` of the steps, then constant or cosine to 0."""
    warmup = math.ceil(warmup_ratio * max_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, max_steps - warmup)))
