"""Peak memory of this process and everything it started, Ray's processes included."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

import psutil

SAMPLE_EVERY_S = 2.0


class PeakMemory:
    """Samples while the block runs; `peak` is in bytes, shared pages counted once (Linux PSS; else RSS)."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, _session_memory())
            if self._stop.wait(SAMPLE_EVERY_S):
                return


def _session_memory() -> int:
    total = 0
    me = psutil.Process(os.getpid())
    for process in [me, *me.children(recursive=True)]:
        try:
            total += _pss(process.pid) or process.memory_info().rss
        except psutil.Error:  # it ended meanwhile
            continue
    return total


def _pss(pid: int) -> int:
    """Proportional set size in bytes; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
