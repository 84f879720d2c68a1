"""A command under attack: the driver processes that run it on a cluster, again and again for the same output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from d3llm_ray.config import Settings, to_yaml
from tests.chaos.cluster import Cluster

PATIENCE_S = 600.0  # with a busy machine


@dataclass(frozen=True)
class Figures:
    """What a fault cost. `units` are a job's rows or steps, `repeated` those that were begun again."""

    fault: str
    kills: int
    units: int
    repeated: int
    seconds: float
    undisturbed_seconds: float

    def report(self, folder: Path) -> None:
        """Write JSON, and print the line of a table."""
        (folder / "figures.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
        extra = self.seconds - self.undisturbed_seconds
        print(f"\n| {self.fault} | {self.kills} | {self.units} | {self.repeated} | {extra:.1f} |")


class Command:
    """Runs the script `driver` beside this file, in `folder`; what its workers log there survives their SIGKILL."""

    driver: str

    def __init__(self, cluster: Cluster, settings: Settings, folder: Path) -> None:
        self._settings, self._cluster, self.folder = settings, cluster, folder
        self.log = folder / "workers.log"
        self.log.touch()
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self.seconds = 0.0  # that drivers were running
        self._started = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill_driver()

    def start(self, *options: str, **overrides: Any) -> None:
        """Start a driver in a process group of its own; `overrides` replace settings."""
        config = self.folder / "job.yaml"
        config.write_text(to_yaml(self._settings.model_copy(update=overrides)))
        command = [sys.executable, str(Path(__file__).with_name(self.driver)), f"--log={self.log}", *options]
        self._starts += 1
        self._started = time.monotonic()
        with self._output_log.open("w") as output:
            self._process = subprocess.Popen(
                [*command, f"--config={config}"],
                stdout=output,
                stderr=output,
                env={**os.environ, "RAY_ADDRESS": self._cluster.address},
                start_new_session=True,
            )

    @property
    def _output_log(self) -> Path:
        return self.folder / f"driver-{self._starts}.log"

    @property
    def printed(self) -> str:
        """What the last driver wrote on stdout and stderr."""
        return self._output_log.read_text()

    @property
    def said(self) -> str:
        """The command's own last line; Ray may print some of its own behind it."""
        return next((line for line in reversed(self.printed.splitlines()) if line.startswith("d3llm-ray: ")), "")

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """The driver's exit code."""
        assert self._process is not None
        code = self._process.wait(timeout_s)
        self.seconds += time.monotonic() - self._started
        return code

    def kill_driver(self) -> None:
        """SIGKILL to the driver's process group."""
        if self.running:
            assert self._process is not None
            os.killpg(self._process.pid, signal.SIGKILL)
            self.wait()

    def wait_for(self, condition: Callable[[], object], every_s: float = 0.02) -> None:
        """Return when `condition` holds; fails when the driver ends first."""

        def holds() -> object:
            found = condition()
            assert found or self.running, self.printed
            return found

        wait_until(holds, every_s)


def wait_until(condition: Callable[[], object], every_s: float = 0.02) -> None:
    """Return when `condition` holds, in time."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(every_s)
