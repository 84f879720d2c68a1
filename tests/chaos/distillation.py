"""One distillation under attack: what its workers logged, and what it must leave behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.training.job import CHECKPOINTS
from d3llm_ray.distillation.training.metrics_file import METRICS_FILE, read_metrics
from d3llm_ray.distillation.training.trackers import SPEED
from tests.chaos.cluster import Cluster, is_running
from tests.chaos.command import Command


class Event(NamedTuple):
    """Something that a worker began, and before the end of which step."""

    what: str
    pid: int
    rank: int
    number: int


class Distillation(Command):
    """Two workers that can be held at a step; the student's folder gets a parent of its own."""

    driver = "distill_driver.py"

    def __init__(self, cluster: Cluster, settings: DistillSettings, folder: Path) -> None:
        self.output = folder / "students" / "student"
        self.settings = settings.model_copy(update={"output": str(self.output)})
        super().__init__(cluster, self.settings, folder)
        self._gate = Path(f"{self.log}.gate")

    def start_and_hold(self, what: str, number: int, *options: str) -> None:
        """Start a driver, and return when its workers stand still at that event."""
        self._gate.write_text(f"{what} {number}")
        began = len(self.events())
        self.start(*options)
        wanted = {(what, number, rank) for rank in range(self.settings.workers)}
        self.wait_for(lambda: wanted <= {(event.what, event.number, event.rank) for event in self.events()[began:]})

    def release(self) -> None:
        """Let the workers go on that are held, and those to come."""
        self._gate.unlink()

    def workers(self) -> dict[int, int]:
        """Ranks of the living workers, by pid."""
        return {pid: rank for pid, rank in {(event.pid, event.rank) for event in self.events()} if is_running(pid)}

    def kill_all(self) -> None:
        """SIGKILL to the driver and all workers."""
        self.kill_driver()
        for pid in self.workers():
            os.kill(pid, signal.SIGKILL)
        self.release()

    def events(self) -> list[Event]:
        lines = (line.split() for line in self.log.read_text().splitlines())
        return [Event(what, int(pid), int(rank), int(number)) for what, pid, rank, number in lines]

    def repeated(self) -> int:
        """How often a step was begun again."""
        begun = [event.number for event in self.events() if event.what == "step" and event.rank == 0]
        return len(begun) - len(set(begun))

    @property
    def work(self) -> Path:
        """The hidden folder of an interrupted run; its writer's lock lies beside it."""
        (folder,) = (path for path in self.output.parent.iterdir() if path.is_dir())
        assert folder.name.startswith(".")
        return folder

    def checkpoints(self) -> list[str]:
        """Names of what is under the checkpoints' folder."""
        return sorted(path.name for path in (self.work / CHECKPOINTS).iterdir())


def figures(folder: Path) -> list[dict[str, Any]]:
    """What was logged for every step, but for how fast it went."""
    lines = read_metrics(folder / METRICS_FILE)
    return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]
