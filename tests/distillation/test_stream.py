"""Ray Data hands every worker its own micro-batches, in order, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray

from d3llm_ray.config import build
from d3llm_ray.distillation.data import TrajectorySet, read_rows
from d3llm_ray.distillation.objectives.batches import MicroBatch
from d3llm_ray.distillation.plan import TrainingPlan
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.training.stream import SHARD, Shards, micro_batches
from tests.distillation.toys import family_of


def same(first: MicroBatch, other: MicroBatch) -> bool:
    arrays = ("token_ids", "lengths", "prompt_lengths", "rows", "labels", "weights", "second")
    return first.prompt_ids == other.prompt_ids and all(
        np.array_equal(getattr(first, name), getattr(other, name)) for name in arrays
    )


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, write_trajectories: Callable[..., Path]) -> TrainingPlan:
    folder = tmp_path_factory.mktemp("rows")
    rows = write_trajectories(folder, rows=70, canvas=32, vocab_size=50, mask_token_id=49)
    values = {"trajectories": str(rows), "output": "out", "batch_size": 16, "micro_batch_size": 4, "epochs": 12}
    settings = build(DistillSettings, {**values, "workers": 1})
    return TrainingPlan(settings, TrajectorySet(read_rows(str(rows), target="trajectory")[0]), family_of("llada")[1])


def test_shards_are_the_plans_batches_behind_the_newest_checkpoint(
    plan: TrainingPlan, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan.max_steps * plan.micro_batches_per_step == 192  # so that each of two workers needs several tasks
    newest = tmp_path / "step-000005"
    monkeypatch.setattr("d3llm_ray.distillation.training.checkpoints.newest", lambda _folder: (newest, []))
    shards = Shards(ray.put(plan), tmp_path).configure({}, world_size=2)
    for rank, shard in enumerate(shards):
        numbers = plan.numbers(5, rank, 2)
        received = list(micro_batches(shard[SHARD], numbers))
        assert len(received) == len(numbers) == 86
        fresh = TrainingPlan(plan.settings, plan.samples, plan.family)
        assert all(same(fresh.micro_batch(number), micro) for number, micro in zip(numbers, received, strict=True))


def test_a_worker_that_expects_other_batches_does_not_train_on_these(
    plan: TrainingPlan, tmp_path: Path, ray_cluster: None
) -> None:
    (shard,) = Shards(ray.put(plan), tmp_path).configure({}, world_size=1)
    with pytest.raises(AssertionError, match="micro-batch 0 came, 4 was due"):
        next(micro_batches(shard[SHARD], plan.numbers(1, 0, 1)))
