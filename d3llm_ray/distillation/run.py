"""`run(settings)`: check, train on Ray, and put the finished student in place."""

from __future__ import annotations

import uuid
from pathlib import Path

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from d3llm_ray import cluster
from d3llm_ray.distillation.preparation import finished, prepare, settle, watched
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.training.job import CHECKPOINTS, Job
from d3llm_ray.distillation.training.loop import NotFiniteError
from d3llm_ray.distillation.training.stream import SHARD, Shards
from d3llm_ray.distillation.training.worker import train_worker
from d3llm_ray.output_folder import sole_writer
from d3llm_ray.progress import Progress


class InterruptibleTrainer(TorchTrainer):
    """Ctrl-C is ours, as in every verb: Ray Train's handler of SIGINT ends the process with exit code 1."""

    def _register_sigint_handler(self, controller: object) -> None:
        pass


@sole_writer
def run(settings: DistillSettings, progress: Progress | None = None) -> Path:
    """Distil a student and return its folder: checkpoint, tokenizer, settings, metrics and loss plot.

    The folder appears when all of it is complete. An interrupted run leaves a hidden folder beside it, from whose
    newest checkpoint the same call continues, with any number of workers; a finished one returns at once. Raises
    `InputError` for bad settings or rows, before Ray starts, for a cluster without room, and for a loss that stops
    being finite; `ray.train.TrainingFailedError` when workers fail more than `max_failures` times.
    """
    done = finished(settings)
    if done is not None:
        return done
    progress = progress or Progress()
    job = prepare(settings, progress)
    resources = {"CPU": float(settings.cpus_per_actor), **({"GPU": 1.0} if settings.gpu else {})}
    # Beside the workers, a CPU each for the tasks that pack their batches.
    cluster.connect(min_cpus=settings.workers * settings.cpus_per_actor + settings.workers)
    cluster.quieten("ray.data")
    cluster.wait_for_resources([resources] * settings.workers, settings.resource_timeout_s, "workers")
    with watched(job, progress):
        stopped = _trainer(job, resources).fit().return_value  # type: ignore[attr-defined]  # Train V2's Result has it
    if stopped is not None:
        raise NotFiniteError(stopped)
    return settle(job)


def _trainer(job: Job, resources: dict[str, float]) -> TorchTrainer:
    settings = job.settings
    plan = ray.put(job.plan)  # once a node, for the workers and for the tasks that pack their batches
    return InterruptibleTrainer(
        train_worker,  # type: ignore[arg-type]  # declared without a return value
        train_loop_config={"plan": plan, "held_out": ray.put(job.held_out), "work": str(job.work)},
        torch_config=TorchConfig(backend="nccl" if settings.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=settings.gpu, resources_per_worker=resources
        ),
        # The rows go through the plan; Ray Train only wants a name for what `Shards` hands to the workers.
        datasets={SHARD: ray.data.range(1)},
        dataset_config=Shards(plan, job.work / CHECKPOINTS),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],  # a name that was used would resume Ray's own record of that run
            storage_path=str(job.work / "ray"),
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )
