"""One trajectory job under attack: what its teachers logged, and what it must leave behind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from d3llm_ray.trajectories import read_trajectories
from d3llm_ray.trajectories.settings import TrajectorySettings
from tests.chaos.cluster import Cluster, is_running
from tests.chaos.command import Command
from tests.chaos.watcher import Watcher

INCOMPLETE = 1  # exit code: the poisoned prompts have no row


@dataclass(frozen=True)
class Expected:
    """What an undisturbed run gives: rows, and ids of the prompts that fail, both in the prompts' order."""

    rows: list[dict[str, Any]]
    failing: list[str]


class Job(Command):
    """Trajectories by slowed-down teachers."""

    driver = "driver.py"

    def __init__(self, cluster: Cluster, settings: TrajectorySettings, folder: Path) -> None:
        super().__init__(cluster, settings, folder)
        self.settings, self.output = settings, Path(settings.output)

    def events(self, kind: str) -> list[tuple[int, str]]:
        """(pid, prompt_id) of every row that a teacher has begun (`begin`) or completed (`end`)."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [(int(pid), row_id) for what, pid, row_id in lines if what == kind]

    def done(self) -> int:
        """Distinct rows that were completed, whether or not they were written."""
        return len({row_id for _, row_id in self.events("end")})

    def teachers(self) -> set[int]:
        """Pids of living actors that have worked."""
        return {pid for pid in {pid for pid, _ in self.events("begin")} if is_running(pid)}

    def busy(self) -> set[int]:
        """Pids of living actors with rows begun and not completed."""
        open_rows = Counter(pid for pid, _ in self.events("begin"))
        open_rows.subtract(pid for pid, _ in self.events("end"))
        return {pid for pid in self.teachers() if open_rows[pid] > 0}

    def recomputed(self) -> int:
        """How often a row was begun again."""
        begun = [row_id for _, row_id in self.events("begin")]
        return len(begun) - len(set(begun))

    def assert_complete(self, expected: Expected, watcher: Watcher) -> None:
        """Every row once, as an undisturbed run has it; nothing but finished files, now and at any moment before."""
        watcher.stop()
        assert watcher.faults == []
        assert watcher.saw_marker
        rows = read_trajectories(self.output).to_pylist()
        assert [row["prompt_id"] for row in rows] == [row["prompt_id"] for row in expected.rows]
        for found, wanted in zip(rows, expected.rows, strict=True):
            # Another batch shape may round a sum of the softmax differently.
            entropies = pytest.approx(wanted["reveal_entropy"], rel=2e-3, abs=2e-3)
            assert found == {**wanted, "reveal_entropy": entropies}
        errors = pq.read_table(self.output / "errors.parquet").to_pylist()
        assert [error["prompt_id"] for error in errors] == expected.failing
        files = -(-len(rows) // self.settings.rows_per_file)
        names = {f"trajectories-{number:05d}.parquet" for number in range(files)}
        names |= {"errors.parquet", "settings.yaml", "summary.json", "_SUCCESS"}
        assert {path.name for path in self.output.iterdir()} == names
