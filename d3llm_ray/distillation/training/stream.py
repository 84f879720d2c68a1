"""Micro-batches as Ray Data shards: corrupted and packed ahead of the workers, each worker's own stream in order.

The rows lie once a node in Ray's object store (5 bytes a token), and the numbers of the micro-batches are the dataset
that is sharded: any number of workers sees the same batches, and a resumed run starts behind its checkpoint.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import DataIterator, Dataset, ExecutionOptions
from ray.train import DataConfig

from d3llm_ray.distillation.objectives.batches import MicroBatch
from d3llm_ray.distillation.plan import TrainingPlan
from d3llm_ray.distillation.training import checkpoints

SHARD = "train"
PER_TASK = 32  # micro-batches packed by one task
AHEAD = 4  # micro-batches that wait, unpickled, beside a worker


class Packer:
    """Packs micro-batches by their numbers; `plan` is an object reference to the run's `TrainingPlan`."""

    def __init__(self, plan: ray.ObjectRef[TrainingPlan]) -> None:
        self.plan = plan

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        plan: TrainingPlan = ray.get(self.plan)
        packed = [pickle.dumps(plan.micro_batch(int(number))) for number in batch["number"]]
        return {"number": batch["number"], "micro_batch": packed}


class Shards(DataConfig):
    """Ray Train asks this, in an actor of its own, for every worker's shard, whenever it (re)starts the workers."""

    def __init__(self, plan: ray.ObjectRef[TrainingPlan], checkpoints_folder: Path) -> None:
        super().__init__()
        self.plan, self.folder = plan, checkpoints_folder

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *_args: Any, **_options: Any
    ) -> list[dict[str, DataIterator]]:
        newest, _warnings = checkpoints.newest(self.folder)
        done = 0 if newest is None else checkpoints.step_of(newest)
        plan: TrainingPlan = ray.get(self.plan)
        return [{SHARD: shard(self.plan, plan.numbers(done, rank, world_size))} for rank in range(world_size)]


def shard(plan: ray.ObjectRef[TrainingPlan], numbers: range) -> DataIterator:
    """A stream of the packed micro-batches `numbers`, in that order."""
    ids = ray.data.range(len(numbers), override_num_blocks=max(1, -(-len(numbers) // PER_TASK)))

    def number(batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        return {"number": batch["id"] * numbers.step + numbers.start}

    packed = ids.map_batches(number, batch_size=PER_TASK).map_batches(Packer(plan).__call__, batch_size=PER_TASK)
    packed.context.execution_options = ExecutionOptions(preserve_order=True)
    (stream,) = packed.streaming_split(1)
    return stream


def micro_batches(stream: DataIterator, numbers: range) -> Iterator[MicroBatch]:
    """What a worker trains on, in order; `numbers` are those that it expects."""
    batches = stream.iter_batches(batch_size=1, prefetch_batches=AHEAD)
    for number, batch in zip(numbers, batches, strict=True):
        assert int(batch["number"][0]) == number, f"micro-batch {batch['number'][0]} came, {number} was due"
        yield pickle.loads(batch["micro_batch"][0])
