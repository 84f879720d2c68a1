"""A small loss module, its batches, and groups of worker processes that train it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from d3llm_ray.distillation.training.engines import EngineOptions, TrainingEngine

WORLD = 2
ROWS, CLASSES = 4, 5
Batch = tuple[Tensor, Tensor]


class ToyLoss(nn.Module):
    """Adapters and a full matrix between frozen layers.

    The matrix is larger than what ZeRO 3 leaves whole (100,000 elements), and no size but the bias's is even, so that
    every partition is padded.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(7, 331).requires_grad_(False)
        self.mixer = nn.Linear(331, 311)
        self.down = nn.Linear(331, 3, bias=False)
        self.up = nn.Linear(3, 311, bias=False)
        self.head = nn.Linear(311, CLASSES).requires_grad_(False)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        features, labels = batch
        hidden = torch.tanh(self.embed(features.to(self.head.weight.dtype)))
        hidden = torch.tanh(self.mixer(hidden) + self.up(self.down(hidden)))
        logits = self.head(hidden).float()
        loss = F.cross_entropy(logits, labels)
        return loss, torch.stack((loss, (logits.argmax(-1) == labels).float().mean())).detach()


def options(*, accumulation: int = 2, **changes: Any) -> EngineOptions:
    """The toy's gradients have norms around 1, so that `clip` bites in some of the steps."""
    values = {"weight_decay": 0.1, "betas": (0.9, 0.95), "clip": 1.0, "micro_batch_size": ROWS, **changes}
    return EngineOptions(accumulation=accumulation, **values)


def lr_at(step: int) -> float:
    return 5e-4 / (step + 1)


def batches(step: int, numbers: Iterable[int]) -> list[Batch]:
    """The micro-batches of those numbers of a step."""
    made = []
    for number in numbers:
        generator = torch.Generator().manual_seed(1000 * step + number)
        features = torch.randn(ROWS, 7, generator=generator)
        made.append((features, torch.randint(CLASSES, (ROWS,), generator=generator)))
    return made


def train(engine: TrainingEngine, steps: Iterable[int], *, accumulation: int = 2) -> dict[str, list[float]]:
    """Losses of this worker's micro-batches and gradient norms of `steps`."""
    losses, norms = [], []
    for step in steps:
        for batch in batches(step, range(engine.rank * accumulation, (engine.rank + 1) * accumulation)):
            loss, _ = engine.forward(batch)
            engine.backward(loss)
            losses.append(loss.item())
        norms.append(engine.step(lr_at(step)))
    return {"losses": losses, "norms": norms}


def values_of(engine: TrainingEngine) -> dict[str, Tensor]:
    return {name: state.value for name, state in engine.collect(engine.trained).items()}


def in_group(work: Callable[[Path], Any], folder: Path) -> list[Any]:
    """What `work(folder)` returns in each of two processes with a gloo group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2])  # the processes import the module of `work` by its name
        torch.multiprocessing.spawn(_member, (work, folder), nprocs=WORLD)
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(WORLD)]


def _member(rank: int, work: Callable[[Path], Any], folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it; Ray Train sets it
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD)
    with redirect_stdout(sys.stderr):
        torch.save(work(folder), folder / f"result-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
