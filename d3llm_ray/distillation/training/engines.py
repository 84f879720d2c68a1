"""Training engines: what computes gradients, averages them over workers and updates the weights.

The training loop and the checkpoints know only `TrainingEngine`. Here is the one for a single process with plain
PyTorch; `deepspeed_engine` has the one for many workers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from d3llm_ray.errors import require

Offload = Literal["none", "optimizer", "all"]
Precision = Literal["float32", "mixed", "bfloat16"]
UNDECAYED = re.compile(r"\bbias$|norm\.weight$")  # names of parameters without weight decay


@dataclass(frozen=True)
class EngineOptions:
    """How to train; `TrainingEngine.step` is given the learning rate.

    `clip`: largest gradient norm. `micro_batch_size`: rows of one forward of one worker. `accumulation`: forwards of
    one worker in an optimizer step. `bfloat16`: weights and their gradients in bfloat16, with float32 masters in the
    optimizer. `zero_stage` and `offload` (to CPU memory: the optimizer's state, or the weights as well) change where
    DeepSpeed keeps things and no result; `torch_engine` has one place only.
    """

    weight_decay: float
    betas: tuple[float, float]
    clip: float
    micro_batch_size: int
    accumulation: int
    zero_stage: int = 0
    offload: Offload = "none"
    bfloat16: bool = False

    def __post_init__(self) -> None:
        require(self.zero_stage in (0, 1, 2, 3), "zero_stage", self.zero_stage, "0, 1, 2 or 3")
        needed = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        accepted = f"{needed} to 3 with offload: {self.offload}"
        require(self.zero_stage >= needed, "zero_stage", self.zero_stage, accepted)


class AdamState(NamedTuple):
    """A trained parameter as AdamW sees it: three float32 tensors of its shape, on the CPU."""

    value: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class TrainingEngine(Protocol):
    """One worker's hold on a loss module, `forward(batch) -> (loss, figures)`, and its optimizer.

    Except where it says otherwise, all workers call every method together.
    """

    rank: int
    world_size: int
    trained: Mapping[str, torch.Size]  # shapes of the trained parameters, by their names in the loss module

    @property
    def updates(self) -> int:
        """Optimizer updates taken, which AdamW's bias correction counts."""

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and figures of one micro-batch of this worker."""

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients, which are means over the micro-batches of a step and over the workers."""

    def step(self, lr: float) -> float:
        """Clip and update, after exactly `accumulation` calls of `backward`.

        Returns the norm of the gradients before clipping. Where that is not finite, nothing has been updated.
        """

    def whole(self) -> AbstractContextManager[None]:
        """Inside, every parameter is whole on every worker; changes to it are forgotten on leaving (ZeRO 3)."""

    def collect(self, names: Collection[str]) -> dict[str, AdamState]:
        """Copies of the state of the named parameters; each worker may name others."""

    def restore(self, load: Callable[[str], AdamState], updates: int) -> None:
        """Take over the state of every trained parameter, asked for one name at a time, on each worker."""


def torch_engine(loss_module: nn.Module, options: EngineOptions) -> TrainingEngine:
    """Train in this process alone, with torch's AdamW."""
    return TorchEngine(loss_module, options)


class TorchEngine:
    """See `TrainingEngine`."""

    rank, world_size = 0, 1

    def __init__(self, loss_module: nn.Module, options: EngineOptions) -> None:
        self.module, self.options = loss_module, options
        if options.bfloat16:
            for parameter in loss_module.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        self.parameters = trained_parameters(loss_module)
        self.trained: Mapping[str, torch.Size] = {name: parameter.shape for name, parameter in self.parameters.items()}
        self.masters: Mapping[str, Tensor] = self.parameters
        if options.bfloat16:
            self.masters = {name: parameter.detach().float() for name, parameter in self.parameters.items()}
        self.optimizer = adamw(self.masters, options)
        create_state(self.optimizer, self.masters.values())

    @property
    def updates(self) -> int:
        return updates_of(self.optimizer)

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        loss, figures = self.module(batch)
        return loss, figures

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss / self.options.accumulation)

    def step(self, lr: float) -> float:
        set_lr(self.optimizer, lr)
        if self.options.bfloat16:
            for name, parameter in self.parameters.items():
                self.masters[name].grad = None if parameter.grad is None else parameter.grad.float()
        norm = clip_gradients(self.masters.values(), self.options.clip)
        self.optimizer.step()
        if self.options.bfloat16:
            for name, parameter in self.parameters.items():
                parameter.data.copy_(self.masters[name])
        self.module.zero_grad()
        return norm

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext()

    def collect(self, names: Collection[str]) -> dict[str, AdamState]:
        return {name: state_of(self.optimizer, self.masters[name]) for name in names}

    def restore(self, load: Callable[[str], AdamState], updates: int) -> None:
        for name, parameter in self.parameters.items():
            state = load(name)
            set_state(self.optimizer, self.masters[name], state)
            parameter.data.copy_(state.value)
        set_updates(self.optimizer, updates)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name: in the module's order, those behind the others that never decay."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return dict(sorted(trained.items(), key=lambda item: bool(UNDECAYED.search(item[0]))))


def adamw(parameters: Mapping[str, Tensor], options: EngineOptions) -> torch.optim.AdamW:
    """AdamW at a learning rate of 0: each step sets its own. Biases and norms do not decay, as in published training.

    `parameters` by name, those that decay first (see `trained_parameters`).
    """
    decays = {name: tensor for name, tensor in parameters.items() if not UNDECAYED.search(name)}
    others = [tensor for name, tensor in parameters.items() if name not in decays]
    groups = [
        {"params": tensors, "weight_decay": decay}
        for tensors, decay in ((list(decays.values()), options.weight_decay), (others, 0.0))
        if tensors  # DeepSpeed takes no empty group
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=options.betas)


def create_state(optimizer: torch.optim.AdamW, masters: Iterable[Tensor]) -> None:
    """Give AdamW the state that it would create at its first step, so that there is one to read and to set before."""
    for master in masters:
        moments = {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
        optimizer.state[master] = {"step": torch.tensor(0.0), **moments}


def set_lr(optimizer: torch.optim.AdamW, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def updates_of(optimizer: torch.optim.AdamW) -> int:
    return max(int(state["step"]) for state in optimizer.state.values())


def set_updates(optimizer: torch.optim.AdamW, updates: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(updates)


def state_of(optimizer: torch.optim.AdamW, master: Tensor) -> AdamState:
    """A copy on the CPU of a tensor that AdamW holds whole, and of its moments."""
    moments = optimizer.state[master]
    tensors = (master.detach(), moments["exp_avg"], moments["exp_avg_sq"])
    return AdamState(*(tensor.to("cpu", copy=True) for tensor in tensors))


def set_state(optimizer: torch.optim.AdamW, master: Tensor, state: AdamState) -> None:
    """The reverse of `state_of`."""
    master.data.copy_(state.value)
    optimizer.state[master]["exp_avg"].copy_(state.exp_avg)
    optimizer.state[master]["exp_avg_sq"].copy_(state.exp_avg_sq)


def clip_gradients(parameters: Iterable[Tensor], largest: float) -> float:
    """Scale the gradients down to the norm `largest`; returns their norm before.

    Where that is not finite the gradients are dropped, and an optimizer step changes nothing.
    """
    parameters = list(parameters)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, largest))
    if not math.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None
    return norm
