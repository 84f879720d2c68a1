"""`distil_here(settings)`: the same run in this process, with plain PyTorch: no Ray, no DeepSpeed, one worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from d3llm_ray.device import check_device
from d3llm_ray.distillation.objectives.batches import MicroBatch
from d3llm_ray.distillation.preparation import finished, prepare, settle, watched
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.training.engines import torch_engine
from d3llm_ray.distillation.training.job import run_worker
from d3llm_ray.distillation.training.trackers import Tracker, run_tracker
from d3llm_ray.output_folder import sole_writer
from d3llm_ray.progress import Progress


@sole_writer
def distil_here(settings: DistillSettings, progress: Progress | None = None) -> Path:
    """Distil a student as `run` does, and return its folder; resumes likewise.

    What `run` splits over workers is accumulated here; ZeRO and offloading have nothing to do. Raises `InputError`.
    """
    check_device(settings.device)
    settings = settings.model_copy(update={"workers": 1, "zero_stage": 0, "offload": "none"})
    done = finished(settings)
    if done is not None:
        return done
    progress = progress or Progress()
    job = prepare(settings, progress)

    def packed(numbers: range) -> Iterator[MicroBatch]:
        return (job.plan.micro_batch(number) for number in numbers)

    def tracker(step: int) -> Tracker:
        return run_tracker(job.work, step, student=Path(settings.output).name, ray=False)

    with watched(job, progress):
        run_worker(job, torch.device(settings.device), torch_engine, packed, tracker)
    return settle(job)
