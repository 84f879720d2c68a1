"""What runs inside a Ray Data actor: one engine, as many calls as Ray Data lets in, and a part written for each.

The actor commits its rows itself, before it answers: what it has finished survives it, its node and the driver.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import pyarrow as pa

from d3llm_ray.metrics import TeacherMetrics
from d3llm_ray.tasks import Task
from d3llm_ray.trajectories.prompts import Prompt
from d3llm_ray.trajectories.schema import SCHEMA, TrajectoryRow, build_table
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.storage import Location

# A part's row: a trajectory, or a prompt that failed with `error` saying why and the trajectory's columns null.
STAGED_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        *(field.with_nullable(True) for field in SCHEMA),
        pa.field("error", pa.string()),
    ]
)
COUNTS = ("rows", "errors", "judged", "correct", "retries", "forwards")
# What a call tells the driver of its part. Times are seconds since the epoch.
RECEIPT_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.int64()) for name in COUNTS),
        pa.field("example", pa.string()),  # one of the errors
        pa.field("ready", pa.float64()),  # when this actor's teacher was loaded
        pa.field("committed", pa.float64()),
        pa.field("errno", pa.int64()),  # of a storage that refused the part; an error raised here would lose its number
        pa.field("refusal", pa.string()),
    ]
)


class TeacherLike(Protocol):
    """What the worker needs of `teacher.Teacher`."""

    @property
    def active(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    def submit(self, prompts: Sequence[Prompt]) -> None: ...

    def step(self) -> list[TrajectoryRow]: ...


class MakeTeacher(Protocol):
    """Builds a teacher inside an actor: `teacher.Teacher`, or a stand-in of a test or measurement."""

    def __call__(self, settings: TrajectorySettings, task: Task) -> TeacherLike: ...


class TeacherWorker:
    """The class that Ray Data puts into its actors: tables of prompts in, a receipt for each written part out.

    Calls overlap: all their prompts share one continuous batch, so that a call's first rows take the slots that the
    last rows of the call before leave free.
    """

    def __init__(self, settings: TrajectorySettings, task: Task, parts: Location, make_teacher: MakeTeacher) -> None:
        self._parts = parts
        self._teacher = make_teacher(settings, task)
        self._ready = time.time()
        self._metrics = TeacherMetrics(settings.teacher)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")  # the event loop never waits for a forward
        self._incoming: list[Prompt] = []
        self._pending: dict[str, asyncio.Future[TrajectoryRow]] = {}
        self._loop: asyncio.Task[None] | None = None

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        rows = await self._decode([Prompt(**row) for row in batch.to_pylist()])
        receipt = {**count_rows(rows), "ready": self._ready}
        try:
            await asyncio.to_thread(write_part, self._parts, rows)
        except OSError as error:
            receipt |= {"errno": error.errno, "refusal": error.strerror or str(error)}
        yield build_table([{**receipt, "committed": time.time()}], RECEIPT_SCHEMA)

    async def _decode(self, prompts: Sequence[Prompt]) -> list[TrajectoryRow]:
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

    def _step(self, incoming: list[Prompt]) -> list[TrajectoryRow]:
        self._teacher.submit(incoming)
        rows = self._teacher.step()
        self._metrics.stepped(self._teacher.active, self._teacher.waiting)
        return rows

    def _count(self, row: TrajectoryRow) -> None:
        if row.get("error") is not None:
            self._metrics.failed()
        else:
            self._metrics.finished(row["is_correct"], len(row["response_ids"]), row["forwards"], row["attempt"])


def write_part(folder: Location, rows: Sequence[TrajectoryRow]) -> Location:
    """Commit rows as one file, whose name follows from their prompts: one that is written again replaces itself."""
    digest = hashlib.sha256("".join(row["prompt_id"] for row in rows).encode()).hexdigest()[:16]
    part = folder / f"part-{rows[0]['row']:012d}-{digest}.parquet"
    part.write_table(build_table(rows, STAGED_SCHEMA))
    return part


def count_rows(rows: Sequence[TrajectoryRow]) -> dict[str, Any]:
    """The `COUNTS` of a receipt, and an example of the errors."""
    good = [row for row in rows if row.get("error") is None]
    judged = [row for row in good if row["is_correct"] is not None]
    return {
        "rows": len(good),
        "errors": len(rows) - len(good),
        "judged": len(judged),
        "correct": sum(row["is_correct"] for row in judged),
        "retries": sum(row["attempt"] for row in good),
        "forwards": sum(row["forwards"] for row in good),
        "example": next((row["error"] for row in rows if row.get("error") is not None), None),
    }
