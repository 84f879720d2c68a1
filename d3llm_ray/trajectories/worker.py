"""What runs inside a Ray Data actor: one engine, and as many calls as Ray Data lets in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import pyarrow as pa
import ray

from d3llm_ray.errors import InputError
from d3llm_ray.metrics import TeacherMetrics
from d3llm_ray.tasks import Task
from d3llm_ray.trajectories.prompts import Prompt
from d3llm_ray.trajectories.schema import SCHEMA, build_table
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.shards import check_errors

# A part's row: a trajectory, or a prompt that failed with `error` saying why and the trajectory's columns null.
STAGED_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        *(field.with_nullable(True) for field in SCHEMA),
        pa.field("error", pa.string()),
    ]
)
Row = dict[str, Any]


class TeacherLike(Protocol):
    """What the worker needs of `teacher.Teacher`."""

    @property
    def active(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    def submit(self, prompts: Sequence[Prompt]) -> None: ...

    def step(self) -> list[Row]: ...


class MakeTeacher(Protocol):
    """Builds a teacher inside an actor: `teacher.Teacher`, or a stand-in of a test or measurement."""

    def __call__(self, settings: TrajectorySettings, task: Task) -> TeacherLike: ...


class Tally:
    """Counts finished rows for the progress line and the error limit; keyed by batch, so that a retried one counts
    once.

    It also carries an actor's `InputError` to the driver, which Ray Data's own wrappers would reduce to a stack trace.
    """

    def __init__(self) -> None:
        self._batches: dict[int, dict[str, int]] = {}
        self._sums = dict.fromkeys(("rows", "errors", "judged", "correct", "retries", "forwards"), 0)
        self._refusal: str | None = None
        self._began = self._ended = 0.0  # monotonic seconds

    def ready(self) -> None:
        """A teacher is loaded. Decoding counts from when the first actors are, not from a restarted one."""
        if not self._batches:
            self._began = self._ended = time.monotonic()

    def seconds(self) -> float:
        """From when the teachers were ready to the last finished batch."""
        return self._ended - self._began

    def refuse(self, message: str) -> None:
        """Note why an actor cannot go on; the first reason stays."""
        self._refusal = self._refusal or message

    def refusal(self) -> str | None:
        return self._refusal

    def add(self, batch: int, counts: dict[str, int]) -> int:
        """Count a batch, known by its first prompt's row; returns the errors so far."""
        self._ended = time.monotonic()
        before = self._batches.get(batch, {})
        self._batches[batch] = counts
        for name in self._sums:
            self._sums[name] += counts[name] - before.get(name, 0)
        return self._sums["errors"]

    def figures(self) -> dict[str, Any]:
        """`done`, and what the progress line shows beside it."""
        sums = self._sums
        figures: dict[str, Any] = {"done": sums["rows"] + sums["errors"]}
        if sums["judged"]:
            figures["correct"] = f"{100 * sums['correct'] / sums['judged']:.1f}%"
        if sums["rows"]:
            figures["forwards"] = sums["forwards"] / sums["rows"]
        figures.update((name, sums[name]) for name in ("retries", "errors") if sums[name])
        return figures


def count_rows(rows: Sequence[Row]) -> dict[str, int]:
    """What `Tally` adds up, of one batch of staged rows."""
    good = [row for row in rows if row.get("error") is None]
    judged = [row for row in good if row["is_correct"] is not None]
    return {
        "rows": len(good),
        "errors": len(rows) - len(good),
        "judged": len(judged),
        "correct": sum(row["is_correct"] for row in judged),
        "retries": sum(row["attempt"] for row in good),
        "forwards": sum(row["forwards"] for row in good),
    }


class TeacherWorker:
    """The class that Ray Data puts into its actors: tables of prompts in, tables of staged rows out.

    Calls overlap: all their prompts share one continuous batch, so that a call's first rows take the slots that the
    last rows of the call before leave free.
    """

    def __init__(
        self, settings: TrajectorySettings, task: Task, total: int, tally: Any, make_teacher: MakeTeacher
    ) -> None:
        self._allowed, self._total, self._tally = settings.max_error_fraction, total, tally
        with self._refusals():
            self._teacher = make_teacher(settings, task)
        ray.get(tally.ready.remote())
        self._metrics = TeacherMetrics(settings.teacher)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")  # the event loop never waits for a forward
        self._incoming: list[Prompt] = []
        self._pending: dict[str, asyncio.Future[Row]] = {}
        self._loop: asyncio.Task[None] | None = None

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        rows = await self._decode([Prompt(**row) for row in batch.to_pylist()])
        failed = await self._tally.add.remote(rows[0]["row"], count_rows(rows))
        example = next((row["error"] for row in rows if "error" in row), "")
        with self._refusals():
            check_errors(failed, self._total, self._allowed, example)
        yield build_table(rows, STAGED_SCHEMA)

    async def _decode(self, prompts: Sequence[Prompt]) -> list[Row]:
        """Add prompts to the running batch; their rows, in their order, when all are complete."""
        for prompt in prompts:
            if prompt.prompt_id not in self._pending:  # a call that Ray repeats waits for the first one's rows
                self._pending[prompt.prompt_id] = asyncio.get_running_loop().create_future()
                self._incoming.append(prompt)
        futures = [self._pending[prompt.prompt_id] for prompt in prompts]
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run())
        return await asyncio.gather(*futures)

    async def _run(self) -> None:
        """Step the teacher while a prompt is pending."""
        loop = asyncio.get_running_loop()
        while self._pending:
            incoming, self._incoming = self._incoming, []
            try:
                rows = await loop.run_in_executor(self._thread, self._step, incoming)
            except Exception as error:  # the engine is at fault, not a prompt: every call must hear of it
                for future in self._pending.values():
                    future.set_exception(error)
                self._pending.clear()
                return
            for row in rows:
                self._pending.pop(row["prompt_id"]).set_result(row)
                self._count(row)

    def _step(self, incoming: list[Prompt]) -> list[Row]:
        self._teacher.submit(incoming)
        rows = self._teacher.step()
        self._metrics.stepped(self._teacher.active, self._teacher.waiting)
        return rows

    def _count(self, row: Row) -> None:
        if row.get("error") is not None:
            self._metrics.failed()
        else:
            self._metrics.finished(row["is_correct"], len(row["response_ids"]), row["forwards"], row["attempt"])

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            ray.get(self._tally.refuse.remote(str(error)))
            raise
