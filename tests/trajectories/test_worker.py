from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d3llm_ray.tasks import EMBEDDED
from d3llm_ray.trajectories.prompts import Prompt
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.staging import PROMPT_SCHEMA
from d3llm_ray.trajectories.storage import Location
from d3llm_ray.trajectories.worker import RECEIPT_SCHEMA, STAGED_SCHEMA, TeacherWorker, write_part


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


@pytest.fixture
def worker(tmp_path: Path) -> TeacherWorker:
    return TeacherWorker(TrajectorySettings(), EMBEDDED["arith"], Location.of(tmp_path), SlowTeacher)


def batch(first: int, count: int) -> pa.Table:
    rows = [
        {"row": n, "prompt_id": f"{n:016x}", "messages": [{"role": "user", "content": str(n)}]}
        for n in range(first, first + count)
    ]
    return pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA)


async def call(worker: TeacherWorker, table: pa.Table) -> dict[str, Any]:
    (out,) = [out async for out in worker(table)]
    assert out.schema == RECEIPT_SCHEMA
    return out.to_pylist()[0]


def parts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    tables = {path.name: pq.read_table(path) for path in sorted(folder.glob("*.parquet"))}
    assert all(table.schema == STAGED_SCHEMA for table in tables.values())
    return {name: table.to_pylist() for name, table in tables.items()}


def test_overlapping_calls_share_one_batch_and_write_a_part_each(worker: TeacherWorker, tmp_path: Path) -> None:
    async def calls() -> list[dict[str, Any]]:
        return await asyncio.gather(call(worker, batch(0, 3)), call(worker, batch(3, 3)), call(worker, batch(6, 2)))

    receipts = asyncio.run(calls())
    written = list(parts(tmp_path).values())
    assert [[row["row"] for row in rows] for rows in written] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [row["error"] for row in written[1]] == [None, None, "too long"]
    assert worker._teacher.most_active == 4  # more than one call's prompts at a time
    expected = {"rows": 2, "errors": 1, "judged": 2, "correct": 2, "retries": 2, "forwards": 6, "example": "too long"}
    assert receipts[1].items() >= expected.items() and receipts[0]["example"] is None
    assert all(receipt["ready"] <= receipt["committed"] for receipt in receipts)


def test_call_that_ray_repeats_decodes_nothing_twice_and_replaces_its_part(
    worker: TeacherWorker, tmp_path: Path
) -> None:
    async def calls() -> list[dict[str, Any]]:
        return await asyncio.gather(call(worker, batch(0, 4)), call(worker, batch(0, 4)))

    asyncio.run(calls())
    assert sorted(worker._teacher.decoded) == [0, 1, 2, 3]
    before = parts(tmp_path)
    asyncio.run(call(worker, batch(0, 4)))  # after its actor was lost: decoded again, and the same
    assert len(before) == 1 and parts(tmp_path) == before


def test_part_with_other_rows_has_another_name(tmp_path: Path) -> None:
    """A resumed run deals the prompts anew: its block may begin with the same prompt and hold others."""
    prompts = [Prompt(**values) for values in batch(0, 4).to_pylist()]
    folder = Location.of(tmp_path)
    assert write_part(folder, [row(p) for p in prompts[:2]]) == write_part(folder, [row(p) for p in prompts[:2]])
    write_part(folder, [row(prompts[0]), row(prompts[3])])
    assert len(parts(tmp_path)) == 2


def test_engine_that_breaks_fails_every_call(worker: TeacherWorker, tmp_path: Path, monkeypatch: Any) -> None:
    def broken(self: SlowTeacher) -> list[dict[str, Any]]:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(SlowTeacher, "step", broken)

    async def calls() -> list[Any]:
        return await asyncio.gather(call(worker, batch(0, 2)), call(worker, batch(2, 2)), return_exceptions=True)

    assert [str(error) for error in asyncio.run(calls())] == ["CUDA error", "CUDA error"]
    assert parts(tmp_path) == {}


def test_storage_that_refuses_is_told_with_its_number_and_file(worker: TeacherWorker, tmp_path: Path) -> None:
    worker._parts = Location.of(tmp_path / "no-folder")
    receipt = asyncio.run(call(worker, batch(0, 2)))
    assert receipt["errno"] == errno.ENOENT and f"{tmp_path}/no-folder/part-000000000000-" in receipt["refusal"]
