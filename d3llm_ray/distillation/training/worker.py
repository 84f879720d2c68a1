"""The Ray Train worker: `run_worker` with DeepSpeed and this worker's shard of Ray Data."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from d3llm_ray.distillation.objectives.batches import MicroBatch
from d3llm_ray.distillation.training import stream
from d3llm_ray.distillation.training.deepspeed_engine import deepspeed_engine
from d3llm_ray.distillation.training.job import Job, run_worker
from d3llm_ray.distillation.training.loop import NotFiniteError
from d3llm_ray.distillation.training.trackers import Tracker, run_tracker


def train_worker(config: dict[str, Any]) -> str | None:
    """Train to the end. Returns why training had to stop, if it had.

    `config` holds references to the run's `plan` and its `held_out` rows, and `work`, the folder that all workers see.
    A loss that is not finite is returned, not raised: Ray would train again from the last checkpoint, to the same end.
    """
    plan, held_out = ray.get([config["plan"], config["held_out"]])
    job = Job(plan.settings, plan, held_out, Path(config["work"]))
    settings = job.settings
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not settings.gpu:
        torch.set_num_threads(settings.cpus_per_actor)

    def shard(numbers: range) -> Iterator[MicroBatch]:
        return stream.micro_batches(ray.train.get_dataset_shard(stream.SHARD), numbers)

    def tracker(done: int) -> Tracker:
        return run_tracker(job.work, done, student=Path(settings.output).name)

    try:
        run_worker(job, ray.train.torch.get_device(), deepspeed_engine, shard, tracker)
    except NotFiniteError as error:
        return str(error)
    return None
