"""A pool of Ray actors, each with the model loaded, that share out the problems of every measurement.

The client's side alone: it imports no model code, so that a process which only asks (a trial of a search) starts
quickly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from d3llm_ray.errors import InputError, WorkError, one_line, require
from d3llm_ray.evaluation.rows import EvaluationRow, labels_of, summarise
from d3llm_ray.tasks.task import Split


class PoolOptions(Protocol):
    """What `engine_pool` needs of a verb's settings."""

    @property
    def model(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def max_batch_size(self) -> int: ...
    @property
    def actors(self) -> int: ...
    @property
    def cpus_per_actor(self) -> int: ...
    @property
    def gpus_per_actor(self) -> float: ...
    @property
    def resource_timeout_s(self) -> float: ...


@dataclass(frozen=True)
class EngineWork:
    """What is measured: problems of a task with a decoder.

    `task`, `task_options`: what `load_task` is called with; the problems are the first `count` of `split`.
    `decoding_settings`: the content of a settings file, the preset under `decoder`. `sampling`: arguments of `evaluate`
    (`max_tokens`, `temperature`, `seed` and so on). Each actor decodes `warmup` problems before its clock starts.
    """

    task: str
    split: Split
    count: int
    decoding_settings: Mapping[str, Any]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    warmup: int = 1
    task_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def problems_key(self) -> tuple[Any, ...]:
        """What decides which problems there are."""
        return self.task, self.split, self.count, dict(self.task_options)


@dataclass(frozen=True)
class EnginePool:
    """Handles of the actors; it may be sent to other processes. Which actor answers never changes a token."""

    actors: Sequence[ActorHandle[Any]]

    def measure(self, work: EngineWork, numbers: Sequence[int]) -> EvaluationRow:
        """One row over the problems of these numbers, in this order, dealt out to all actors; `seconds` is the slowest
        actor's, as they work at the same time.

        Raises:
            InputError: no problems, one without a reference, or an unknown setting.
            WorkError: an actor was lost again and again.
        """
        require(len(numbers) > 0, "problems", 0, "at least one problem")
        parts = [numbers[part :: len(self.actors)] for part in range(len(self.actors))]
        asked = [actor.measure.remote(work, list(part)) for actor, part in zip(self.actors, parts, strict=True) if part]
        rows: list[EvaluationRow] = _get(asked)
        dealt = [iter(row.samples) for row in rows]
        samples = [next(dealt[place % len(self.actors)]) for place in range(len(numbers))]
        return summarise(samples, max(row.seconds for row in rows), **_labels(work, rows[0], len(numbers)))

    def measure_shards(self, work: EngineWork, shards: Iterable[Sequence[int]]) -> Iterator[EvaluationRow]:
        """A row a shard, each shared out over all actors; nothing is decoded ahead of the row that is asked for."""
        for shard in shards:
            yield self.measure(work, shard)

    def each(self, items: Iterable[tuple[EngineWork, Sequence[int]]]) -> Iterator[tuple[int, int, EvaluationRow]]:
        """Index of an item, number of the actor that measured it alone, and its row, as they are finished.

        An actor takes the next item when it is free: every one works until none is left.
        """
        waiting = deque(enumerate(items))
        idle = deque(range(len(self.actors)))
        running: dict[Any, tuple[int, int]] = {}
        while waiting or running:
            while waiting and idle:
                (index, (work, numbers)), actor = waiting.popleft(), idle.popleft()
                running[self.actors[actor].measure.remote(work, list(numbers))] = (index, actor)
            done, _ = ray.wait(list(running), num_returns=1)
            index, actor = running.pop(done[0])
            idle.append(actor)
            yield index, actor, _get(done)[0]


def together(work: EngineWork, rows: Sequence[EvaluationRow], seconds: float) -> EvaluationRow:
    """One row of several of the same work, in the order of their problems."""
    samples = [sample for row in rows for sample in row.samples]
    return summarise(samples, seconds, **_labels(work, rows[0], len(samples)))


def _labels(work: EngineWork, row: EvaluationRow, problems: int) -> dict[str, Any]:
    return labels_of(row) | {"warmup": min(work.warmup, problems)}  # of an actor that was warm: 0


@contextmanager
def engine_pool(options: PoolOptions) -> Iterator[EnginePool]:
    """Start the actors in the Ray that this process is connected to, wait until each has loaded the model, and end them
    afterwards.

    Raises:
        InputError: they did not start in time; the line compares what they ask for with what the cluster has.
    """
    from d3llm_ray.evaluation.actor import EngineActor

    resources = {"num_cpus": options.cpus_per_actor, "num_gpus": options.gpus_per_actor}
    threads = max(1, options.cpus_per_actor) if options.device == "cpu" else 0
    model = (options.model, options.dtype, options.device, options.max_batch_size, threads)
    actors = [EngineActor.options(**resources).remote(*model) for _ in range(options.actors)]  # type: ignore[attr-defined]
    try:
        try:
            _get([actor.ready.remote() for actor in actors], timeout=options.resource_timeout_s)
        except GetTimeoutError as error:
            raise InputError(_too_few(options)) from error
        yield EnginePool(tuple(actors))
    finally:
        for actor in actors:
            ray.kill(actor)


def _get(asked: list[Any], timeout: float | None = None) -> list[Any]:
    """Answers of actors; an error of ours as it was raised there, without Ray's account of where that was."""
    try:
        return ray.get(asked, timeout=timeout)
    except RayTaskError as error:
        if isinstance(error.cause, InputError | WorkError):
            raise error.cause from error
        raise
    except RayActorError as error:
        cause = getattr(error, "cause", None) or error
        raise WorkError(f"actors: an engine could not be kept alive: {one_line(cause)[-500:]}") from error


def _too_few(options: PoolOptions) -> str:
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return (
        f"actors: {options.actors} of {options.cpus_per_actor} CPUs and {options.gpus_per_actor:g} GPUs did not "
        f"start in {options.resource_timeout_s:g} s (resource_timeout_s); free in the cluster: "
        f"{free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs"
    )
