"""An engine in a Ray actor: one model, loaded once, that measures any problems with any decoder."""

from __future__ import annotations

from collections.abc import Sequence

import ray
import torch

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.evaluation.evaluate import evaluate
from d3llm_ray.evaluation.pool import EngineWork
from d3llm_ray.evaluation.rows import EvaluationRow
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import Problem, Task, load_task


@ray.remote(max_restarts=3, max_task_retries=3)
class EngineActor:
    """Its answers are those of `evaluate` in any process, so that a call may be repeated and by any other actor.

    `threads`: of the CPU that forwards take; 0 leaves PyTorch's own number.
    """

    def __init__(self, model: str, dtype: str, device: str, max_batch_size: int, threads: int) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._llm = DiffusionLLM.from_pretrained(model, dtype=dtype, device=device, max_batch_size=max_batch_size)
        self._warm: EngineWork | None = None
        self._loaded: tuple[EngineWork, Task, list[Problem]] | None = None

    def ready(self) -> bool:
        return True

    def measure(self, work: EngineWork, numbers: Sequence[int]) -> EvaluationRow:
        """Decode the problems of these numbers. Warm-up: only where the actor's call before was of other work."""
        task, problems = self._problems(work)
        warmup = 0 if self._warm == work else work.warmup
        self._warm = work
        return evaluate(
            self._llm,
            task,
            [problems[number] for number in numbers],
            progress=Progress(quiet=True),
            warmup=warmup,
            **work.sampling,
            **work.decoding_settings,
        )

    def _problems(self, work: EngineWork) -> tuple[Task, list[Problem]]:
        if self._loaded is None or self._loaded[0].problems_key != work.problems_key:
            task = load_task(work.task, **work.task_options)
            self._loaded = work, task, task.problems(work.split, work.count)
        return self._loaded[1:]
