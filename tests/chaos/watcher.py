"""Looks at an output folder all the time, as an impatient reader would."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pyarrow.parquet as pq

from d3llm_ray.trajectories import read_trajectories
from d3llm_ray.trajectories.storage import SUCCESS

POLL_S = 0.005


class Watcher:
    """Opens every file that shows up in a folder under a final name, from a thread; `faults` says what was wrong.

    Names that begin with "_" are not looked at, as Parquet readers skip them, except the marker: from the moment
    it shows, the folder must hold all rows.
    """

    def __init__(self, folder: Path, expected_ids: list[str]) -> None:
        self.faults: list[str] = []
        self.saw_marker = False
        self._folder, self._expected = folder, expected_ids
        self._seen: set[tuple[str, int, int]] = set()  # name, inode, time of the last change
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Look one last time, and no more."""
        self._over.set()
        self._thread.join()
        self._look_around()

    def _watch(self) -> None:
        while not self._over.wait(POLL_S):
            self._look_around()

    def _look_around(self) -> None:
        marker = self._folder / SUCCESS
        finished = marker.exists()  # asked first: what it vouches for must be there already
        for path in self._folder.glob("[!_.]*"):
            self._look(path)
        if finished:
            self._look(marker)

    def _look(self, path: Path) -> None:
        try:
            status = path.stat()
            version = (path.name, status.st_ino, status.st_mtime_ns)
            if version in self._seen:
                return
            self._seen.add(version)
            if path.suffix == ".parquet":
                pq.read_table(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.name == SUCCESS:
                self._check_finished()
        except FileNotFoundError:
            return  # left over from an earlier attempt, and removed between the listing and now
        except Exception as error:  # whatever a reader may raise is what this looks for
            self.faults.append(f"{path.name}: {error}")

    def _check_finished(self) -> None:
        self.saw_marker = True
        found = read_trajectories(self._folder, columns=["prompt_id"])["prompt_id"].to_pylist()
        if found != self._expected:
            self.faults.append(f"{SUCCESS}: set over {len(found)} of {len(self._expected)} rows")
