"""The trajectories command with a slow teacher that logs what it does, and with a disk that may become full.

python driver.py --log FILE [--full-disk PATTERN] --config SETTINGS.yaml
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs

from d3llm_ray.cli import main
from d3llm_ray.tasks import Task
from d3llm_ray.trajectories import pipeline
from d3llm_ray.trajectories.prompts import Prompt
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.storage import Location
from d3llm_ray.trajectories.teacher import Teacher

PAUSE_S = 0.05  # before a forward: kills must hit teachers at work


class LoggedTeacher(Teacher):
    """A line for every row that it begins or completes: which, pid, prompt_id. Survives a SIGKILL of its actor."""

    def __init__(self, settings: TrajectorySettings, task: Task, log: str, pause: float) -> None:
        super().__init__(settings, task)
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)  # a short append is never torn
        self._pause = pause

    def submit(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self._note("begin", prompt.prompt_id)
        super().submit(prompts)

    def step(self) -> list[dict[str, Any]]:
        time.sleep(self._pause)
        rows = super().step()
        for row in rows:
            self._note("end", row["prompt_id"])
        return rows

    def _note(self, what: str, prompt_id: str) -> None:
        os.write(self._log, f"{what} {os.getpid()} {prompt_id}\n".encode())


class FullFile(io.FileIO):
    """A file of which half of the first write fits on the disk. Like Arrow's own, the error does not name it."""

    def write(self, data: Any) -> int:
        view = memoryview(data)
        super().write(view[: len(view) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(fs.FSSpecHandler):
    """This host's files; the disk is full from the third one on whose path matches, whichever process writes it."""

    def __init__(self, pattern: str, ledger: str) -> None:
        super().__init__(LocalFileSystem())
        self._pattern, self._ledger = pattern, ledger

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(FullFile(path, "wb") if self._is_full(path) else self.fs.open(path, "wb"), mode="w")

    def _is_full(self, path: str) -> bool:
        if not re.search(self._pattern, path):
            return False
        with open(self._ledger, "ab") as ledger:  # one byte a file: what all processes share is its size
            ledger.write(b".")
            ledger.flush()
            return ledger.tell() >= 3


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--log", required=True)
    parser.add_argument("--full-disk")
    options, command_line = parser.parse_known_args()
    if options.full_disk:
        disk = fs.PyFileSystem(FullDisk(options.full_disk, f"{options.log}.files"))
        Location.of = staticmethod(lambda name, field="path": Location(disk, str(name), str(name)))
    teacher = partial(LoggedTeacher, log=options.log, pause=PAUSE_S)
    pipeline.run = partial(pipeline.run, make_teacher=teacher)  # where the command line finds it
    sys.exit(main([TrajectorySettings.verb, *command_line]))
