"""Fast-dLLM v2: block diffusion from a causal model, on complementary masks (arXiv:2509.26328, section 3.1).

A row holds the sequence clean, then under a mask, then under its complement, at the same positions. A noisy block sees
itself and the clean blocks before it, as it will when decoding; clean blocks see themselves and those before. Blocks
count from position 0, prompt included.

The published trainer forwards clean and noisy halves for either mask. What no masked token depends on is left out
here, with the same loss: the second clean half, the last clean block, and noisy copies of blocks of the prompt alone.
Padding ends with the block of the stop token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d3llm_ray.distillation.convert import block_diffusion_family
from d3llm_ray.distillation.objectives.base import Batch, LossModule, Moment, Objective, is_right, parameter
from d3llm_ray.distillation.objectives.batches import MicroBatch, TrainingSample, View
from d3llm_ray.distillation.objectives.corruption import Draws, block_ratios, corrupted, mask_blocks
from d3llm_ray.errors import require
from d3llm_ray.models.config import ModelConfig
from d3llm_ray.models.families import Attention, Family
from d3llm_ray.models.ragged import Ragged


@dataclass(frozen=True)
class BlockDiffusion(Objective):
    """Blocks of `block_size` (the model's `bd_size`), each masked at a ratio of its own, and the complement."""

    block_size: int = parameter(16, "tokens in a block", gt=0)

    name: ClassVar[str] = "block-diffusion"
    summary: ClassVar[str] = "from a causal model (Fast-dLLM v2)"
    figures: ClassVar[tuple[str, ...]] = ("ce", "right")
    teacher_attention: ClassVar[tuple[Attention, ...]] = ("causal", "block-causal")

    @property
    def rows_per_sample(self) -> int:
        return 3  # clean and under both masks

    def student(
        self, shape: ModelConfig, family: Family, mask_token_id: Callable[[], int]
    ) -> tuple[ModelConfig, Family]:
        """A causal teacher's family becomes Fast-dLLM v2's; one of that family must have the same blocks."""
        if family.layout.attention == "causal":
            return block_diffusion_family(family, mask_token_id(), self.block_size)
        accepted = f"{family.block_size}, the teacher's own (bd_size)"
        require(self.block_size == family.block_size, "objective.block_size", self.block_size, accepted)
        return shape, family

    def views(self, draws: Draws, sample: TrainingSample, moment: Moment | None, family: Family) -> list[View]:
        """One row with the answer under a mask and under its complement; the prompt is never masked."""
        assert family.mask_token_id is not None
        prompt, response = sample.prompt_ids.size, self._answer(sample, family)
        first, length = self._first(prompt), prompt + response.size
        block_of = (prompt + np.arange(response.size)) // self.block_size
        block_of -= block_of[0]
        masked = mask_blocks(draws.epoch, block_of, block_ratios(draws.epoch, int(block_of[-1]) + 1))
        parts = [np.concatenate((sample.prompt_ids, response))[: self._clean(length)]]
        rows, labels = [], []
        for chosen in (masked, ~masked):
            places = np.flatnonzero(chosen)
            rows.append(sum(part.size for part in parts) + prompt - first + places - int(family.logit_shift))
            labels.append(response[places])
            parts.append(np.concatenate((sample.prompt_ids[first:], corrupted(response, chosen, family.mask_token_id))))
        return [
            View(
                token_ids=np.concatenate(parts),
                rows=np.concatenate(rows),
                labels=np.concatenate(labels),
                weights=np.ones(response.size, dtype=np.float32),
                mask_ratio=float(masked.mean()),
            )
        ]

    def _answer(self, sample: TrainingSample, family: Family) -> NDArray[np.int32]:
        """The response up to the end of its first stop token's block, behind which decoding begins no other."""
        prompt = sample.prompt_ids.size
        blocks = (prompt + sample.answer_length(family.stop_token_ids) - 1) // self.block_size + 1
        return sample.response_ids[: blocks * self.block_size - prompt]

    def _first(self, prompt: int) -> int:
        """Where noisy copies begin: at the block of the prompt's last token, which predicts the answer's first."""
        return (prompt - 1) // self.block_size * self.block_size

    def _clean(self, length: int) -> int:
        """Clean tokens that are read: nothing but itself sees the last block."""
        return (length - 1) // self.block_size * self.block_size

    def _length(self, row: int, first: int) -> int:
        """Tokens of prompt and answer in a packed row, which has `_clean(length) + 2 (length - first)`."""
        blocks, rest = divmod(row + 2 * first - 2, 3 * self.block_size)
        return blocks * self.block_size + rest // 2 + 1

    def layout(self, micro: MicroBatch, device: torch.device) -> Ragged:
        """The three parts of each row at shared positions, under the mask of the module's first lines."""
        rows = micro.lengths.tolist()
        plain = Ragged.build(rows, device=device)
        positions = []
        mask = np.zeros((len(rows), 1, max(rows), max(rows)), dtype=np.bool_)  # [B, 1, W, S]
        for index, (row, prompt) in enumerate(zip(rows, micro.prompt_lengths.tolist(), strict=True)):
            first = self._first(prompt)
            length = self._length(row, first)
            noisy = np.arange(first, length)
            positions.append(np.concatenate((np.arange(self._clean(length)), noisy, noisy)))
            part = np.repeat(np.arange(3), (row - 2 * noisy.size, noisy.size, noisy.size))
            mask[index, 0, :row, :row] = visible(positions[-1] // self.block_size, part)
            mask[index, 0, row:] = mask[index, 0, row - 1]  # the rectangle repeats a row's last token
        return dataclasses.replace(
            plain,
            positions=torch.from_numpy(np.concatenate(positions)).to(device),
            mask=torch.from_numpy(mask).to(device),
            patterned=True,
        )

    def loss(self, module: LossModule, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over the masked tokens of both views."""
        hidden = module.hidden(batch, batch.layout)
        ce, right = module.by_token(partial(_terms, module), hidden, batch.labels)
        figures = torch.stack((ce.mean(), right.mean())).detach()
        return ce.mean(), figures


def visible(block: NDArray[np.int64], part: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tokens each token sees, [T, T], from the block and the part (0 is the clean one) of each, [T]."""
    same = (part[:, None] == part) & (block[:, None] == block)
    seen: NDArray[np.bool_] = same | ((part == 0) & (block < block[:, None]))
    return seen


def _terms(module: LossModule, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = module.logits(hidden)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none"), is_right(logits, labels)
