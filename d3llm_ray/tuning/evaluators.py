"""A pool of Ray actors, each with the model loaded, that share out the problems of every measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.evaluate import evaluate
from d3llm_ray.evaluation.rows import EvaluationRow
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import load_task
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.tuning.trial import Pool


@ray.remote(max_restarts=3, max_task_retries=3)
class Evaluator:
    """All problems of the search and those held out, any of which it decodes with any settings."""

    def __init__(self, settings: TuneSettings) -> None:
        if settings.device == "cpu":
            torch.set_num_threads(max(1, settings.cpus_per_actor))
        self._settings = settings
        self._task = load_task(settings.task)
        self._problems = self._task.problems(settings.split, settings.count + settings.held_out)
        self._llm = DiffusionLLM.from_pretrained(
            settings.model, dtype=settings.dtype, device=settings.device, max_batch_size=settings.max_batch_size
        )

    def ready(self) -> bool:
        return True

    def measure(self, decoding_settings: dict[str, Any], numbers: Sequence[int], first: bool = True) -> EvaluationRow:
        """Decode the problems of these numbers; safe to repeat. `first`: the first call with these settings."""
        settings = self._settings
        return evaluate(
            self._llm,
            self._task,
            [self._problems[number] for number in numbers],
            settings.max_tokens,
            settings.temperature,
            settings.seed,
            Progress(quiet=True),
            warmup=1 if first and settings.metric.endswith("tps") else 0,  # nothing else depends on time
            **decoding_settings,
        )


@contextmanager
def evaluator_pool(settings: TuneSettings) -> Iterator[Pool]:
    """Start the evaluators, wait until each has loaded the model, and end them afterwards.

    Raises:
        InputError: they did not start in time; the line compares what they ask for with what the cluster has.
    """
    options = {"num_cpus": settings.cpus_per_actor, "num_gpus": settings.gpus_per_actor}
    pool = [Evaluator.options(**options).remote(settings) for _ in range(settings.actors)]  # type: ignore[attr-defined]
    try:
        try:
            ray.get([actor.ready.remote() for actor in pool], timeout=settings.resource_timeout_s)
        except GetTimeoutError as error:
            raise InputError(_too_few(settings)) from error
        yield pool
    finally:
        for actor in pool:
            ray.kill(actor)


def _too_few(settings: TuneSettings) -> str:
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return (
        f"actors: {settings.actors} of {settings.cpus_per_actor} CPUs and {settings.gpus_per_actor:g} GPUs did not "
        f"start in {settings.resource_timeout_s:g} s (resource_timeout_s); free in the cluster: "
        f"{free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs"
    )
