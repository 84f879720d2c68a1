"""The moment by which a request must have been answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType


class DeadlinePassed(Exception):
    """A request was not answered in time; nothing is done for it any more."""


class Deadline:
    """`limit_s` seconds from now on, on the running event loop's clock; None: never.

    As a context it cancels what is awaited in it and raises `DeadlinePassed`.
    """

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self._at = None if limit_s is None else asyncio.get_running_loop().time() + limit_s
        self._timeout = asyncio.timeout_at(self._at)

    def passed(self) -> DeadlinePassed:
        """What to raise when it has."""
        return DeadlinePassed(f"the answer was not complete after {self._limit_s:g} s")

    def call(self, callback: Callable[[], None]) -> asyncio.TimerHandle | None:
        """Have `callback` called when it passes, unless the handle is cancelled."""
        return None if self._at is None else asyncio.get_running_loop().call_at(self._at, callback)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as late:
            raise self.passed() from late
