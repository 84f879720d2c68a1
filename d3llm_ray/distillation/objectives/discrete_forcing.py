"""D2F, discrete diffusion forcing: a block-causal student imitates its own weights under full attention.

arXiv:2508.09192, section 3.2: every block is masked at a ratio of its own that never falls from left to right, and
the teacher (the same model without its adapter) reads the same noisy answer with full attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from d3llm_ray.distillation.objectives.base import Batch, LossModule, Moment, Objective, is_right, parameter
from d3llm_ray.distillation.objectives.batches import MicroBatch, TrainingSample, View
from d3llm_ray.distillation.objectives.corruption import Draws, corrupted, mask_blocks, monotone_ratios
from d3llm_ray.errors import require
from d3llm_ray.models.families import Family
from d3llm_ray.models.ragged import BlockCausal, Ragged


@dataclass(frozen=True)
class DiscreteForcing(Objective):
    """Blocks of `block_size` from the start of the answer, each masked at a ratio within `noise`."""

    block_size: int = parameter(16, "tokens in a block", gt=0)
    noise: tuple[float, float] = parameter((0.2, 0.7), "smallest and largest mask ratio of a block")

    name: ClassVar[str] = "d2f"
    summary: ClassVar[str] = "block-causal student of its own full attention (D2F)"
    figures: ClassVar[tuple[str, ...]] = ("ce", "right")
    needs_adapter: ClassVar[bool] = True  # the student without its adapter is the teacher

    def __post_init__(self) -> None:
        low, high = self.noise
        require(0 < low <= high <= 1, "noise", [low, high], "two ratios in (0, 1], the smaller one first")

    def views(self, draws: Draws, sample: TrainingSample, moment: Moment | None, family: Family) -> list[View]:
        """One view; a token's loss is divided by its block's ratio."""
        assert family.mask_token_id is not None
        block_of = np.arange(sample.response_ids.size) // self.block_size
        ratios = monotone_ratios(draws.epoch, int(block_of[-1]) + 1, *self.noise)
        masked = np.flatnonzero(mask_blocks(draws.epoch, block_of, ratios))
        noisy = corrupted(sample.response_ids, masked, family.mask_token_id)
        return [
            View(
                token_ids=np.concatenate((sample.prompt_ids, noisy)),
                rows=sample.prompt_ids.size + masked - int(family.logit_shift),
                labels=sample.response_ids[masked],
                weights=(1 / ratios[block_of[masked]]).astype(np.float32),
                mask_ratio=masked.size / block_of.size,
            )
        ]

    def layout(self, micro: MicroBatch, device: torch.device) -> Ragged:
        """The prompt sees itself, a block itself and what is before it."""
        patterns = [BlockCausal(self.block_size, origin=int(length)) for length in micro.prompt_lengths]
        return Ragged.build(micro.lengths.tolist(), patterns=patterns, device=device)

    def loss(self, module: LossModule, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean over masked tokens of cross-entropy to the teacher's distribution over the token's mask ratio."""
        with torch.no_grad(), module.model.disable_adapter():  # type: ignore[operator]  # peft's
            full = Ragged.build(batch.micro.lengths.tolist(), device=batch.token_ids.device)
            target = module.hidden(batch, full)
        hidden = module.hidden(batch, batch.layout)
        ce, right = module.by_token(partial(_terms, module), hidden, target, batch.labels)
        figures = torch.stack((ce.mean(), right.mean())).detach()
        return (ce * batch.weights).mean(), figures


def _terms(module: LossModule, hidden: Tensor, target: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    # The LM head has no adapter: it is the teacher's as well.
    with torch.no_grad():
        wanted = module.logits(target).softmax(-1)
    logits = module.logits(hidden)
    return -(wanted * logits.log_softmax(-1)).sum(-1), is_right(logits, labels)
