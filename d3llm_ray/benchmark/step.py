"""What an optimizer step costs: tokens/s, share of the device's peak, memory.

Needs torch, transformers and peft alone. A published shape gets random weights, made on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from d3llm_ray.benchmark.machine import find_machine
from d3llm_ray.benchmark.report import BenchmarkReport
from d3llm_ray.benchmark.shapes import random_model
from d3llm_ray.benchmark.step_flops import step_flops
from d3llm_ray.benchmark.step_plan import StepPlan
from d3llm_ray.benchmark.step_rows import COLUMNS, COUNTING, PHASES, StepRow
from d3llm_ray.benchmark.workload import DEFAULT_MODEL, read_shape, synthetic_prompts
from d3llm_ray.device import peak_memory, timed
from d3llm_ray.distillation.lora import add_lora, coverage
from d3llm_ray.distillation.memory import TrainingMemoryPlan, plan_memory
from d3llm_ray.distillation.objectives import LossModule
from d3llm_ray.distillation.objectives.batches import MicroBatch, TrainingSample, pack
from d3llm_ray.distillation.objectives.corruption import draws
from d3llm_ray.distillation.student import recompute_layers
from d3llm_ray.distillation.training.engines import EngineOptions, torch_engine
from d3llm_ray.distillation.training.loop import attention_kernel
from d3llm_ray.errors import WorkError, require
from d3llm_ray.models import Family, ModelConfig, Transformer, Work, load_model

LR = 2e-5
T = TypeVar("T")


class Stepping(Protocol):
    """What `optimizer_step` needs of an `Engine`."""

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, lr: float) -> float: ...


def optimizer_step(
    engine: Stepping, module: LossModule, share: Sequence[MicroBatch], lr: float, device: torch.device
) -> Tensor:
    """One step over the micro-batches `share`, nothing beside it; returns their mean loss, a scalar on the device."""
    losses = []
    for micro in share:
        with attention_kernel(device):
            loss, _ = engine.forward(module.batch(micro, device))
            engine.backward(loss)
        losses.append(loss.detach().float())
    engine.step(lr)
    return torch.stack(losses).mean()


def measure_step(plan: StepPlan) -> BenchmarkReport[StepRow]:
    """Time `plan.steps` optimizer steps, one by one, after `plan.warmup_steps` others.

    Raises:
        InputError: a plan that cannot be carried out, before any weight is read or made.
        RuntimeError: a loss that is not finite.
    """
    config, family = _read_shape(plan)
    device = torch.device(plan.device)
    machine = find_machine(plan.machine, device, torch.float32 if plan.precision == "float32" else torch.bfloat16)
    torch.manual_seed(plan.seed)
    model = _student(plan, config, device)
    covered = coverage(model)
    module = LossModule(model, plan.objective, head_rows=plan.head_rows, autocast=plan.precision == "mixed")
    options = EngineOptions(
        weight_decay=0.01,
        betas=(0.9, 0.999),
        clip=1.0,
        micro_batch_size=plan.micro_batch_size,
        accumulation=plan.accumulation,
        bfloat16=plan.precision == "bfloat16",
    )
    engine = torch_engine(module, options)
    steps = _steps(plan, config, family, plan.warmup_steps + plan.steps + 1)
    take = partial(optimizer_step, module=module, lr=LR, device=device)

    losses = [take(engine, share=share) for share in steps[: plan.warmup_steps]]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # loading and the optimizer's creation are not of a step
    seconds = []
    for share in steps[plan.warmup_steps : -1]:
        elapsed, loss = timed(device, partial(take, engine, share=share))
        seconds.append(elapsed)
        losses.append(loss)
    peak = peak_memory(device)
    clocked = Clocked(engine, device)
    losses.append(take(clocked, share=steps[-1]))
    values = torch.stack(losses).tolist()
    if not all(map(math.isfinite, values)):
        raise WorkError(f"losses that are not finite: {values}")
    work = reduce(add, map(_work, steps[0]))
    flops = step_flops(
        config,
        work,
        adapters=covered.trained if plan.lora_rank else 0,
        checkpointing=plan.activation_checkpointing,
        recomputed_head=steps[0][0].labels.size > plan.head_rows,
    )
    row = StepRow(
        model=plan.shape or Path(plan.model or DEFAULT_MODEL).name,
        samples=plan.micro_batch_size * plan.accumulation,
        peak_flops=machine.flops,
        coverage=covered,
        work=work,
        flops=flops,
        seconds=tuple(seconds),
        phases=clocked.seconds,
        losses=tuple(values),
    )
    memory = _memory_plan(plan, config, steps[0][0])
    return BenchmarkReport(
        benchmark="step",
        plan=asdict(plan),
        rows=(row,),
        ratios=(),
        columns=COLUMNS,
        counting=COUNTING,
        roofline=machine,
        memory={"planned": memory.total, "peak": peak},
        lines=(str(covered), str(memory)),
    )


class Clocked:
    """An engine with the seconds of each phase, for which the device is waited for between them."""

    def __init__(self, engine: Stepping, device: torch.device) -> None:
        self.engine, self.device = engine, device
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self._timed("forward", partial(self.engine.forward, batch))

    def backward(self, loss: Tensor) -> None:
        self._timed("backward", partial(self.engine.backward, loss))

    def step(self, lr: float) -> float:
        return self._timed("optimizer", partial(self.engine.step, lr))

    def _timed(self, phase: str, work: Callable[[], T]) -> T:
        seconds, result = timed(self.device, work)
        self.seconds[phase] += seconds
        return result


def _read_shape(plan: StepPlan) -> tuple[ModelConfig, Family]:
    _, config, family = read_shape(plan.model, plan.shape)
    full = family.layout.attention == "full"
    require(full, "model", plan.shape or plan.model, "a masked-diffusion model with full attention")
    longest = config.max_position_embeddings
    accepted = f"at most {longest - plan.answer_tokens} before answers of {plan.answer_tokens}"
    require(plan.length <= longest, "prompt_tokens", plan.prompt_tokens, accepted)
    return config, family


def _student(plan: StepPlan, config: ModelConfig, device: torch.device) -> Transformer | PeftModel:
    if plan.shape is None:
        model, _ = load_model(plan.model or DEFAULT_MODEL, str(plan.dtype).removeprefix("torch."), device)
    else:
        model = random_model(config, plan.dtype, device, plan.seed)
    if plan.activation_checkpointing:
        recompute_layers(model)
    model.train().requires_grad_(plan.lora_rank == 0)
    if plan.lora_rank == 0:
        return model
    return add_lora(model, rank=plan.lora_rank, alpha=plan.lora_rank, dropout=0.0, targets=tuple(config.projections))


def _steps(plan: StepPlan, config: ModelConfig, family: Family, count: int) -> list[list[MicroBatch]]:
    """Micro-batches of random tokens revealed in random order, all of the same lengths and mask counts."""
    number = count * plan.accumulation * plan.micro_batch_size
    rows = np.array(synthetic_prompts(family, config.vocab_size, number, plan.length, plan.seed), dtype=np.int32)
    rng = np.random.default_rng(plan.seed)
    samples = [
        TrainingSample(
            prompt_id=str(n),
            prompt_ids=row[: plan.prompt_tokens],
            response_ids=row[plan.prompt_tokens :],
            reveal_step=rng.permutation(plan.answer_tokens).astype(np.uint16),
        )
        for n, row in enumerate(rows)
    ]
    views = [plan.objective.views(draws(plan.seed, 0, sample.prompt_id), sample, None, family) for sample in samples]
    micro_batches = [
        pack(
            [sample.prompt_id for sample in samples[first : first + plan.micro_batch_size]],
            [plan.prompt_tokens] * plan.micro_batch_size,
            views[first : first + plan.micro_batch_size],
        )
        for first in range(0, number, plan.micro_batch_size)
    ]
    return [
        micro_batches[first : first + plan.accumulation] for first in range(0, len(micro_batches), plan.accumulation)
    ]


def _work(micro: MicroBatch) -> Work:
    return Work(micro.token_ids.size, int((micro.lengths**2).sum()), micro.token_ids.size, micro.labels.size)


def _memory_plan(plan: StepPlan, config: ModelConfig, micro: MicroBatch) -> TrainingMemoryPlan:
    return plan_memory(
        config,
        rank=plan.lora_rank,
        targets=tuple(config.projections),
        precision=plan.precision,
        zero_stage=0,
        workers=1,
        offload="none",
        micro_batch_size=plan.micro_batch_size,
        longest_row=plan.length,
        rows_per_sample=plan.objective.rows_per_sample,
        supervised_rows=micro.labels.size,
        head_rows=plan.head_rows,
        activation_checkpointing=plan.activation_checkpointing,
    )
