from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest

from d3llm_ray.config import build
from d3llm_ray.errors import InputError
from d3llm_ray.tasks import EMBEDDED
from d3llm_ray.trajectories import worker as module
from d3llm_ray.trajectories.prompts import Prompt
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.staging import PROMPT_SCHEMA
from d3llm_ray.trajectories.worker import STAGED_SCHEMA, Tally, TeacherWorker, count_rows


class SlowTeacher:
    """Completes one prompt in three steps, at most four at a time; prompt 5 cannot be decoded."""

    def __init__(self, settings: TrajectorySettings, task: Any) -> None:
        self.queue: list[tuple[Prompt, int]] = []
        self.most_active = 0
        self.decoded: list[int] = []

    @property
    def active(self) -> int:
        return min(4, len(self.queue))

    @property
    def waiting(self) -> int:
        return max(0, len(self.queue) - 4)

    def submit(self, prompts: Sequence[Prompt]) -> None:
        self.queue += [(prompt, 3) for prompt in prompts]

    def step(self) -> list[dict[str, Any]]:
        self.most_active = max(self.most_active, self.active)
        running, waiting = self.queue[:4], self.queue[4:]
        rows = [row(prompt) for prompt, left in running if left == 1]
        self.decoded += [prompt.row for prompt, left in running if left == 1]
        self.queue = [(prompt, left - 1) for prompt, left in running if left > 1] + waiting
        return rows


def row(prompt: Prompt) -> dict[str, Any]:
    if prompt.row == 5:
        return {"row": 5, "prompt_id": prompt.prompt_id, "messages": prompt.messages, "error": "too long"}
    values = {"row": prompt.row, "prompt_id": prompt.prompt_id, "response_ids": [prompt.row], "reveal_step": [0]}
    return {**values, "is_correct": True, "attempt": 1, "forwards": 3, "prompt_ids": [1]}


class Direct:
    """A method of an actor that lives in this process: `remote` gives something to await and to `ray.get`."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def remote(self, *args: Any) -> Ready:
        return Ready(self.method(*args))


class Ready:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Any:
        return self.value
        yield


class LocalTally:
    def __init__(self) -> None:
        self.tally = Tally()

    def __getattr__(self, name: str) -> Direct:
        return Direct(getattr(self.tally, name))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> TeacherWorker:
    monkeypatch.setattr(module.ray, "get", lambda ready: ready.value)
    settings = build(TrajectorySettings, {"max_error_fraction": 0.1})
    return TeacherWorker(settings, EMBEDDED["arith"], 20, LocalTally(), SlowTeacher)


def batch(first: int, count: int) -> pa.Table:
    rows = [
        {"row": n, "prompt_id": f"{n:016x}", "messages": [{"role": "user", "content": str(n)}]}
        for n in range(first, first + count)
    ]
    return pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA)


async def call(worker: TeacherWorker, table: pa.Table) -> pa.Table:
    (out,) = [out async for out in worker(table)]
    return out


def test_overlapping_calls_share_one_batch_and_keep_their_own_rows(worker: TeacherWorker) -> None:
    async def calls() -> list[pa.Table]:
        return await asyncio.gather(call(worker, batch(0, 3)), call(worker, batch(3, 3)), call(worker, batch(6, 2)))

    tables = asyncio.run(calls())
    assert [table["row"].to_pylist() for table in tables] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert all(table.schema == STAGED_SCHEMA for table in tables)
    assert tables[1]["error"].to_pylist() == [None, None, "too long"]
    teacher, tally = worker._teacher, worker._tally.tally
    assert teacher.most_active == 4  # more than one call's prompts at a time
    assert tally.figures() == {"done": 8, "correct": "100.0%", "forwards": 3.0, "retries": 7, "errors": 1}


def test_call_that_ray_repeats_decodes_nothing_twice_at_a_time(worker: TeacherWorker) -> None:
    async def calls() -> list[pa.Table]:
        return await asyncio.gather(call(worker, batch(0, 4)), call(worker, batch(0, 4)))

    one, other = asyncio.run(calls())
    assert one == other and sorted(worker._teacher.decoded) == [0, 1, 2, 3]
    assert worker._tally.tally.figures()["done"] == 4


def test_engine_that_breaks_fails_every_call(worker: TeacherWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: SlowTeacher) -> list[dict[str, Any]]:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(SlowTeacher, "step", broken)

    async def calls() -> list[Any]:
        return await asyncio.gather(call(worker, batch(0, 2)), call(worker, batch(2, 2)), return_exceptions=True)

    assert [str(error) for error in asyncio.run(calls())] == ["CUDA error", "CUDA error"]


def test_too_many_errors_end_the_job_with_a_reason_the_driver_can_read(worker: TeacherWorker) -> None:
    worker._total = 5
    with pytest.raises(InputError, match="1 of 5 gave no trajectory, for example: too long; accepted: at most 10%"):
        asyncio.run(call(worker, batch(4, 2)))
    assert "1 of 5 gave no trajectory" in worker._tally.tally.refusal()


def test_tally_counts_a_retried_batch_once_and_a_corrected_one_anew() -> None:
    rows = [{"is_correct": n > 0, "attempt": 0, "forwards": n} for n in range(4)]
    counts = count_rows([*rows, {"error": "too long"}])
    assert counts == {"rows": 4, "errors": 1, "judged": 4, "correct": 3, "retries": 0, "forwards": 6}
    tally = Tally()
    tally.ready()
    assert [tally.add(0, counts), tally.add(0, counts), tally.add(64, counts)] == [1, 1, 2]
    assert tally.figures() == {"done": 10, "correct": "75.0%", "forwards": 1.5, "errors": 2}
    assert tally.seconds() >= 0
