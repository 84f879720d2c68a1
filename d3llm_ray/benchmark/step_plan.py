"""What the benchmark of an optimizer step measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

import torch

from d3llm_ray.benchmark.machine import check_machine
from d3llm_ray.benchmark.plan import MEASURED, option, require_count
from d3llm_ray.device import check_device
from d3llm_ray.distillation.objectives import PseudoTrajectory
from d3llm_ray.distillation.training.engines import Precision
from d3llm_ray.errors import require, unknown


@dataclass(frozen=True)
class StepPlan:
    """By default a micro-batch of the published LLaDA recipe (arXiv:2601.07568).

    A row has `prompt_tokens` + `answer_tokens` tokens. With `complement` each is forwarded twice, as both views of its
    window, as in the published step; otherwise once. A step is `accumulation` forwards of `micro_batch_size` rows.

    Raises:
        InputError: a value out of range, or options that exclude each other.
    """

    model: str | None = option(None, "zoo name or checkpoint folder; default tiny-llada, unless a shape is given")
    shape: str | None = option(None, "random weights of a published shape: llada-8b or dream-7b")
    micro_batch_size: int = option(4, "rows a forward")
    prompt_tokens: int = option(128, "tokens of a row's prompt")
    answer_tokens: int = option(256, "tokens of a row's answer")
    window: int = option(32, "tokens of a window, a divisor of answer_tokens")
    mask_ratio: float = option(0.5, "share of the window that is masked")
    complement: bool = option(True, "forward the complementary view of every row as well")
    lora_rank: int = option(256, "rank of adapters on every projection; 0 trains every weight")
    precision: Precision = field(
        default="bfloat16", metadata={"description": "float32; mixed: bfloat16 over float32 weights; bfloat16"}
    )
    activation_checkpointing: bool = option(True, "recompute each layer in the backward pass")
    head_rows: int = option(1024, "rows of logits held at a time")
    accumulation: int = option(1, "micro-batches of a step")
    warmup_steps: int = option(3, "first steps, which are not measured")
    steps: int = option(10, "measured steps")
    machine: str = option(MEASURED, "peak: measured here, or the data sheet of a100, h100, h200 or b200")
    device: str = option("cpu", "cpu, cuda or cuda:N")
    seed: int = option(0, "seed of random weights, rows and masks")

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "prompt_tokens", "answer_tokens", "window", "head_rows", "accumulation"):
            require_count(name, getattr(self, name))
        for name in ("warmup_steps", "steps"):
            require_count(name, getattr(self, name))
        require(self.answer_tokens % self.window == 0, "window", self.window, "a divisor of answer_tokens")
        require(0 < self.mask_ratio <= 1, "mask_ratio", self.mask_ratio, "a number in (0, 1]")
        require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "0 or a rank")
        if self.precision not in get_args(Precision):
            raise unknown("precision", self.precision, get_args(Precision))
        check_machine(self.machine)
        data_sheet = "measured, or a precision with bfloat16 (data sheets give the peak of that)"
        require(self.machine == MEASURED or self.precision != "float32", "machine", self.machine, data_sheet)
        check_device(self.device)
        require(self.model is None or self.shape is None, "shape", self.shape, "a model or a shape, not both")

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    @property
    def objective(self) -> PseudoTrajectory:
        """d3LLM's, at one mask ratio."""
        return PseudoTrajectory(
            window_sizes=(self.window,),
            window_domain="canvas",  # every step as large
            noise_start=self.mask_ratio,
            noise_end=self.mask_ratio,
            noise_max=self.mask_ratio,
            complement_weight=0.25 * self.complement,
            certainty_weight=0.5,
        )
