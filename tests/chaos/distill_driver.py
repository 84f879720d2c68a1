"""The distill command, whose workers log what they do, wait at a gate to be killed, and may break a weight.

python distill_driver.py --log FILE [--poison STEP] [--node FOLDER] --config SETTINGS.yaml
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import ray
from torch import nn

from d3llm_ray.cli import main
from d3llm_ray.distillation import run
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.training import worker
from d3llm_ray.distillation.training.deepspeed_engine import deepspeed_engine
from d3llm_ray.distillation.training.engines import AdamState, EngineOptions
from d3llm_ray.distillation.training.job import MakeEngine

GATEKEEPER = 1  # the rank that waits; the others then wait for it, in the next collective call


class LoggedEngine:
    """A line for every start, step and checkpoint that a worker begins: which, pid, rank, number of the step.

    While the file `log`.gate holds `step 37`, say, worker 1 waits in that step, with its gradients computed; at
    `save 60`, when the other workers write their shards of that checkpoint.
    """

    def __init__(self, loss_module: nn.Module, options: EngineOptions, log: str, poison: int | None) -> None:
        self._engine = deepspeed_engine(loss_module, options)
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND)  # a short append is never torn
        self._gate, self._poison = Path(f"{log}.gate"), poison
        self._weight = next(parameter for parameter in loss_module.parameters() if parameter.requires_grad)
        self._begin("start", 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, lr: float) -> float:
        self._begin("step", self._engine.updates + 1)
        norm = self._engine.step(lr)
        if self._engine.rank == GATEKEEPER and self._engine.updates == self._poison:
            self._weight.data.fill_(float("nan"))
        return norm

    def collect(self, names: Collection[str]) -> dict[str, AdamState]:
        found = self._engine.collect(names)
        self._begin("save", self._engine.updates)
        return found

    def _begin(self, what: str, number: int) -> None:
        os.write(self._log, f"{what} {os.getpid()} {self._engine.rank} {number}\n".encode())
        with contextlib.suppress(FileNotFoundError):  # the gate is open
            while self._engine.rank == GATEKEEPER and self._gate.read_text() == f"{what} {number}":
                time.sleep(0.02)


def train_worker(config: dict[str, Any], make_engine: MakeEngine) -> str | None:
    """The worker with another engine, in its own process."""
    worker.deepspeed_engine = make_engine
    return worker.train_worker(config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--log", required=True)
    parser.add_argument("--poison", type=int)
    parser.add_argument("--node")
    options, command_line = parser.parse_known_args()
    if options.node:
        ray.init = partial(ray.init, _temp_dir=options.node)  # of the nodes on this host, Ray would join the head
    engine = partial(LoggedEngine, log=options.log, poison=options.poison)
    run.train_worker = partial(train_worker, make_engine=engine)
    sys.exit(main([DistillSettings.verb, *command_line]))
