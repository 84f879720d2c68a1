"""Fast-dLLM v2: block diffusion from a causal model, on complementary masks (arXiv:2509.26328, section 3.1).

A view holds the sequence twice: clean, then noisy, at the same positions. A noisy block sees itself and the clean
blocks before it, as it will when decoding; clean blocks see themselves and those before. Blocks count from position
0, prompt included.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d3llm_ray.distillation.batches import MicroBatch, Sample, View
from d3llm_ray.distillation.corruption import Draws, block_ratios, corrupted, mask_blocks
from d3llm_ray.distillation.objectives.base import Batch, LossModule, Scheduled, is_right
from d3llm_ray.models.families import Family
from d3llm_ray.models.ragged import Ragged


@dataclass(frozen=True)
class BlockDiffusion:
    """Blocks of `block_size` (the model's `bd_size`), each masked at a ratio of its own, and the complement."""

    block_size: int

    figures: ClassVar[tuple[str, ...]] = ("ce", "right")

    def views(self, draws: Draws, sample: Sample, scheduled: Scheduled, family: Family) -> list[View]:
        """The answer under a mask, and under its complement; the prompt is never masked."""
        assert family.mask_token_id is not None
        prompt = sample.prompt_ids.size
        block_of = (prompt + np.arange(sample.response_ids.size)) // self.block_size
        block_of -= block_of[0]
        masked = mask_blocks(draws.epoch, block_of, block_ratios(draws.epoch, int(block_of[-1]) + 1))
        clean = np.concatenate((sample.prompt_ids, sample.response_ids))
        views = []
        for chosen in (masked, ~masked):
            noisy = corrupted(sample.response_ids, chosen, family.mask_token_id)
            places = np.flatnonzero(chosen)
            views.append(
                View(
                    token_ids=np.concatenate((clean, sample.prompt_ids, noisy)),
                    rows=clean.size + prompt + places - int(family.logit_shift),
                    labels=sample.response_ids[places],
                    weights=np.ones(places.size, dtype=np.float32),
                    mask_ratio=places.size / masked.size,
                )
            )
        return views

    def layout(self, micro: MicroBatch, device: torch.device) -> Ragged:
        """Clean and noisy halves of each view at shared positions, under the mask of the module's first lines."""
        lengths = micro.lengths.tolist()
        plain = Ragged.build(lengths, device=device)
        positions = np.concatenate([np.tile(np.arange(length // 2), 2) for length in lengths])
        width = max(lengths)
        mask = np.zeros((len(lengths), 1, width, width), dtype=np.bool_)  # [B, 1, W, S]
        for row, length in enumerate(lengths):
            mask[row, 0, :length, :length] = visible(length // 2, self.block_size)
            mask[row, 0, length:] = mask[row, 0, length - 1]  # the rectangle repeats a view's last token
        return dataclasses.replace(
            plain,
            positions=torch.from_numpy(positions).to(device),
            mask=torch.from_numpy(mask).to(device),
            patterned=True,
        )

    def loss(self, module: LossModule, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over the masked tokens of both views."""
        hidden = module.hidden(batch, batch.layout)
        ce, right = module.by_token(partial(_terms, module), hidden, batch.labels)
        figures = torch.stack((ce.mean(), right.mean())).detach()
        return ce.mean(), figures


def visible(length: int, block_size: int) -> NDArray[np.bool_]:
    """Which of the 2 x `length` keys (clean, then noisy) each of as many queries sees: [2 length, 2 length]."""
    block = np.tile(np.arange(length) // block_size, 2)
    noisy = np.arange(2 * length) >= length
    same_half = noisy[:, None] == noisy[None, :]
    same_block = block[:, None] == block[None, :]
    earlier_clean = ~noisy[None, :] & (block[None, :] < block[:, None])
    seen: NDArray[np.bool_] = (same_half & same_block) | earlier_clean
    return seen


def _terms(module: LossModule, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = module.logits(hidden)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none"), is_right(logits, labels)
