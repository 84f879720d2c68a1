"""One progress line for long work: stage, done of total, rate, time left and figures of the work itself."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

POLL_S = 0.5


class Progress:
    """Draws on stderr; on a terminal in place, elsewhere a line every half minute (logs stay readable)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.prefix = ""  # put before every stage's name, such as "[2/5] "
        self._quiet = quiet
        self._bar: tqdm | None = None

    def start(self, stage: str, total: int | None, unit: str = "row") -> None:
        """Begin a stage of `total` units; a stage still open is closed first."""
        self.finish()
        interactive = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=f"{self.prefix}{stage}",
            unit=f" {unit}",
            disable=self._quiet,
            mininterval=0.5 if interactive else 30.0,
            dynamic_ncols=True,
            leave=True,
        )

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str = "row") -> Iterator[None]:
        """A stage that lasts as long as the block; its line is closed before an error is told."""
        self.start(name, total, unit)
        try:
            yield
        finally:
            self.finish()

    def update(self, done: int, **figures: float | int | str) -> None:
        """Say that `done` units of the stage are complete in all, with named figures to show beside it."""
        if self._bar is None:
            return
        if figures:
            self._bar.set_postfix(
                {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in figures.items()}, refresh=False
            )
        self._bar.update(done - self._bar.n)

    def note(self, text: str) -> None:
        """Print lines that stay, above the stage's line if there is one."""
        if not self._quiet:
            tqdm.write(text, file=sys.stderr)

    def finish(self) -> None:
        """Close the stage's line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextmanager
def polled(show: Callable[[], None]) -> Iterator[None]:
    """Call `show` every half second from a thread of its own while the block runs in this one."""
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(POLL_S):
            show()

    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
