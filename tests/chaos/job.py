"""One trajectory job under attack: its driver processes, what its teachers logged, and what it must leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from d3llm_ray.config import to_yaml
from d3llm_ray.trajectories import read_trajectories
from d3llm_ray.trajectories.settings import TrajectorySettings
from tests.chaos.cluster import Cluster, is_running
from tests.chaos.watcher import Watcher

PAUSE_S = 0.05  # of the teacher before a forward: kills must hit it at work
PATIENCE_S = 300.0  # with a busy machine
DRIVER = Path(__file__).with_name("driver.py")


@dataclass(frozen=True)
class Expected:
    """What an undisturbed run gives: rows, and ids of the prompts that fail, both in the prompts' order."""

    rows: list[dict[str, Any]]
    failing: list[str]


@dataclass(frozen=True)
class Figures:
    """What a fault cost."""

    fault: str
    kills: int
    rows: int
    recomputed: int
    seconds: float
    undisturbed_seconds: float

    def report(self, folder: Path) -> None:
        """Write JSON, and print the line of a table."""
        (folder / "figures.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
        extra = self.seconds - self.undisturbed_seconds
        print(f"\n| {self.fault} | {self.kills} | {self.rows} | {self.recomputed} | {extra:.1f} |")


class Job:
    """Runs `driver.py` on a cluster, again and again for the same output folder if need be."""

    def __init__(self, cluster: Cluster, settings: TrajectorySettings, folder: Path) -> None:
        self.settings, self.output = settings, Path(settings.output)
        self._cluster, self._folder = cluster, folder
        self._log = folder / "teachers.log"
        self._log.touch()
        self._driver: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self.seconds = 0.0  # that drivers were running
        self._started = 0.0

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill_driver()

    def start(self, *options: str, **overrides: Any) -> None:
        """Start a driver in a process group of its own; `overrides` replace settings."""
        config = self._folder / "job.yaml"
        config.write_text(to_yaml(self.settings.model_copy(update=overrides)))
        command = [sys.executable, str(DRIVER), f"--log={self._log}", f"--pause={PAUSE_S}", *options]
        self._starts += 1
        self._started = time.monotonic()
        with self._output_log.open("w") as output:
            self._driver = subprocess.Popen(
                [*command, f"--config={config}"],
                stdout=output,
                stderr=output,
                env={**os.environ, "RAY_ADDRESS": self._cluster.address},
                start_new_session=True,
            )

    @property
    def _output_log(self) -> Path:
        return self._folder / f"driver-{self._starts}.log"

    @property
    def printed(self) -> str:
        """What the last driver wrote on stdout and stderr."""
        return self._output_log.read_text()

    @property
    def running(self) -> bool:
        return self._driver is not None and self._driver.poll() is None

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """The driver's exit code."""
        assert self._driver is not None
        code = self._driver.wait(timeout_s)
        self.seconds += time.monotonic() - self._started
        return code

    def kill_driver(self) -> None:
        """SIGKILL to the driver's process group."""
        if self.running:
            assert self._driver is not None
            os.killpg(self._driver.pid, signal.SIGKILL)
            self.wait()

    def wait_for(self, condition: Callable[[], object], every_s: float = 0.02) -> None:
        """Return when `condition` holds; fails when the driver ends first."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.running and time.monotonic() < deadline, self.printed
            time.sleep(every_s)

    def events(self, kind: str) -> list[tuple[int, str]]:
        """(pid, prompt_id) of every row that a teacher has begun (`begin`) or completed (`end`)."""
        lines = [line.split() for line in self._log.read_text().splitlines()]
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
