"""The training loop: micro-batches in, optimizer steps, figures out. No Ray; any engine."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from d3llm_ray.device import peak_memory
from d3llm_ray.distillation.objectives import LossModule
from d3llm_ray.distillation.objectives.batches import MicroBatch
from d3llm_ray.distillation.training.engines import TrainingEngine
from d3llm_ray.errors import InputError

if TYPE_CHECKING:
    from d3llm_ray.distillation.plan import TrainingPlan

Line = dict[str, float | int | str]


class NotFiniteError(InputError):
    """The loss is not a number any more; says at which step and on which rows."""


@dataclass(frozen=True)
class Hooks:
    """What happens beside the steps. `log` takes a line of figures, `save` and `validate` a count of steps."""

    log: Callable[[Line], None]
    save: Callable[[int], None]
    validate: Callable[[int], Line]


@dataclass
class Clock:
    """Samples, tokens and steps a second since the last line."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    tokens: int = 0

    def lap(self, samples_a_step: int, workers: int) -> Line:
        """Rates over all workers (their shares are of equal length on average), and start anew."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        line: Line = {
            "samples_per_second": self.steps * samples_a_step / elapsed,
            "tokens_per_second": self.tokens * workers / elapsed,
            "steps_per_second": self.steps / elapsed,
        }
        self.started, self.steps, self.tokens = time.perf_counter(), 0, 0
        return line


def train(
    engine: TrainingEngine,
    module: LossModule,
    plan: TrainingPlan,
    micro_batches: Iterator[MicroBatch],
    done: int,
    hooks: Hooks,
    device: torch.device,
) -> None:
    """Take the steps from `done` to the plan's end.

    `micro_batches` yields this worker's share in order. Everything random is a function of (seed, epoch, prompt_id)
    or (seed, step, worker), so that a resumed run repeats an uninterrupted one. Raises `NotFiniteError` on every
    worker when any worker's loss is not finite; that step is not taken.
    """
    settings, last = plan.settings, plan.max_steps
    clock = Clock()
    for step in range(done, last):
        torch.manual_seed(settings.seed + step * engine.world_size + engine.rank)  # LoRA dropout, also after a resume
        share = list(islice(micro_batches, settings.accumulation))
        assert len(share) == settings.accumulation, f"the stream of batches ended at step {step + 1}"
        figures = []
        for micro in share:
            with attention_kernel(device):
                loss, parts = engine.forward(module.batch(micro, device))
                engine.backward(loss)
            figures.append(torch.cat((loss.detach().float().reshape(1), parts)))
        mean = torch.stack(figures).mean(0)
        check_finite(mean[0], share, step + 1, engine.world_size)
        moment, lr = plan.at(step), plan.lr(step)
        norm = engine.step(lr)
        if not math.isfinite(norm):
            raise NotFiniteError(not_finite("gradient", step + 1, share))
        clock.steps += 1
        clock.tokens += sum(micro.token_ids.size for micro in share)
        finished = step + 1
        validated = settings.val_every is not None and (finished % settings.val_every == 0 or finished == last)
        if finished % settings.log_every == 0 or finished == last or validated:
            names = ("loss", *plan.objective.figures)
            ratio = sum(micro.mask_ratio for micro in share) / len(share)
            values = mean_over_workers(torch.cat((mean, mean.new_tensor([ratio]))), engine.world_size)
            line: Line = {"step": finished, "epoch": moment.epoch, **plan.objective.curriculum(moment), "lr": lr}
            line |= dict(zip((*names, "mask_ratio"), values, strict=True))
            line |= {"grad_norm": norm, **clock.lap(settings.batch_size, engine.world_size)}
            line["memory_gib"] = peak_memory(device) / 2**30
            if validated:
                line |= hooks.validate(finished)
                clock = Clock()  # validation is not training time
            hooks.log(line)
        if finished % settings.checkpoint_every == 0 and finished < last:
            hooks.save(finished)


def check_finite(loss: Tensor, share: list[MicroBatch], step: int, workers: int) -> None:
    """Raise `NotFiniteError` on all workers when one of them has no finite loss."""
    if workers == 1:
        broken = [] if bool(loss.isfinite()) else [share]
    else:
        flag = (~loss.isfinite()).float()
        dist.all_reduce(flag)
        if not flag.item():
            return
        shares: list[list[MicroBatch] | None] = [None] * workers
        dist.all_gather_object(shares, None if bool(loss.isfinite()) else share)
        broken = [part for part in shares if part is not None]
    if broken:
        raise NotFiniteError(not_finite("loss", step, [micro for part in broken for micro in part]))


def not_finite(what: str, step: int, share: list[MicroBatch]) -> str:
    """The message for a loss or gradient that is not finite."""
    ids = ", ".join(prompt_id for micro in share for prompt_id in micro.prompt_ids)
    return (
        f"{what}: not finite at step {step}, on the rows {ids}; training stopped and the last checkpoint is kept; "
        "accepted: a smaller lr, precision: float32, or a dataset without these rows"
    )


def mean_over_workers(figures: Tensor, workers: int) -> list[float]:
    """The mean of a vector of figures over all workers, on each of them."""
    if workers > 1:
        dist.all_reduce(figures)
    return [float(value) for value in (figures / workers).tolist()]


def barrier(engine: TrainingEngine) -> None:
    """Wait for the other workers, if there are any."""
    if engine.world_size > 1:
        dist.barrier()


def attention_kernel(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Plain attention on a CPU: the fused kernel's backward pass in bfloat16 is three times slower there."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
