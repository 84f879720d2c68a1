"""The thread that owns the engine, and the bridge between it and the event loop.

The event loop never waits for a forward: it puts commands into an inbox and reads a queue per request. The thread
takes the commands between two forwards, so a request joins, or leaves, at the next one.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from d3llm_ray.decoding import Engine, Event, Request
from d3llm_ray.metrics import ServingMetrics
from d3llm_ray.serving.autoscaling import Load
from d3llm_ray.serving.backlog import Backlog
from d3llm_ray.serving.deadline import Deadline

logger = logging.getLogger("d3llm_ray.serving")
# Events gather for so long. Each time that the event loop wakes, the two threads take Python's lock from each other,
# which costs a small model a good part of a forward; one of an 8B model takes longer than this.
GATHER_S = 0.02
STOP_TIMEOUT_S = 10.0  # a forward that hangs must not keep its process from ending


class Overloaded(Exception):
    """The engine's slots and its queue are full."""


class EngineFailure(Exception):
    """The engine raised, or was shut down; this worker decodes nothing any more."""


@dataclass(eq=False)
class Submission:
    """One request on its way through the engine. `close` frees its slot; a finished one needs no closing."""

    request: Request
    worker: EngineWorker
    events: Backlog = field(default_factory=Backlog)
    engine_id: int | None = None  # of the engine's thread alone
    timer: asyncio.TimerHandle | None = None  # until its deadline
    urgent: bool = False  # every event counts at once: what it is may end the decoding, or is to be seen
    begun: bool = False  # of the engine's thread alone: an event has been told
    arrived: float = field(default_factory=time.monotonic)

    async def next_event(self) -> Event:
        """Wait for the next event; raises what ended the request instead."""
        item = await self.events.get()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        self.worker.release(self)


Command = tuple[Literal["submit", "cancel"], Submission]


class EngineWorker:
    """Runs one engine in a thread of its own.

    At most `capacity` requests are in flight (slots and queue together). An exception of the engine fails all of
    them and ends the worker, and so does a forward that takes longer than `step_timeout_s`: a replica with a broken
    engine is replaced, not mended.
    """

    def __init__(self, engine: Engine, capacity: int, metrics: ServingMetrics, step_timeout_s: float) -> None:
        self._engine = engine
        self._capacity = capacity
        self._metrics = metrics
        self._step_timeout_s = step_timeout_s
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._open: set[Submission] = set()  # of the event loop
        self._decoding: dict[int, Submission] = {}  # of the thread, by engine id, in order of submission
        self._untold: list[tuple[Submission, Event]] = []  # of the thread
        self._told_at = float("-inf")
        self._step_began: float | None = None
        self._failure: EngineFailure | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start decoding; call it on the event loop that will submit requests."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._watch()

    def stop(self) -> None:
        """End the thread after the forward that is running, unless that hangs."""
        self._inbox.put(None)
        if self._thread.is_alive() and self._hang() is None:
            self._thread.join(STOP_TIMEOUT_S)

    @property
    def in_flight(self) -> int:
        """Requests submitted and neither finished nor closed."""
        return len(self._open)

    def load(self) -> Load:
        """What the engine has to do; call it on the event loop."""
        engine, active = self._engine, self._engine.active
        queued = sorted(self._open, key=lambda submission: submission.arrived)[active:]  # it admits in order
        sizes = [one.request.canvas_size(engine.decoder, engine.family, engine.context)[0] for one in queued]
        return Load(active, sum(sizes), engine.max_batch_size)

    def problem(self) -> str | None:
        """What is wrong, or None. Reads two attributes and no lock: it answers while a forward runs or hangs."""
        return str(self._failure or "") or self._hang()

    def _hang(self) -> str | None:
        began = self._step_began
        if began is not None and time.monotonic() - began > self._step_timeout_s:
            return f"a forward has not ended for {self._step_timeout_s:g} s"
        return None

    def _watch(self) -> None:
        """Fail all requests when a forward hangs: nothing else would ever end them. Looks again and again."""
        assert self._loop is not None
        hang = self._hang()
        if hang is None:
            self._loop.call_later(min(1.0, self._step_timeout_s / 10), self._watch)
        elif self._failure is None:
            logger.error("%s, with %d requests in flight", hang, len(self._open))
            self._fail(EngineFailure(hang))

    def check_room(self, count: int = 1) -> None:
        """Raise what `submit` would raise now for one of `count` requests."""
        if self._failure is not None:
            raise self._failure
        if len(self._open) + count > self._capacity:
            self._metrics.refused()
            raise Overloaded

    def submit(self, request: Request, deadline: Deadline | None = None, urgent: bool = False) -> Submission:
        """Queue a request that `engine.check` accepts. Raises `Overloaded` or `EngineFailure`.

        When the deadline passes its slot is freed, whoever waits for it, and `DeadlinePassed` is its last event.
        """
        self.check_room()
        submission = Submission(request, self, urgent=urgent)
        self._open.add(submission)
        if deadline is not None:
            submission.timer = deadline.call(lambda: self._expire(submission, deadline))
        self._inbox.put(("submit", submission))
        self._metrics.accepted()
        return submission

    def release(self, submission: Submission) -> None:
        """Forget a request whose answer nobody waits for; nothing happens if it has ended."""
        if submission in self._open:
            self._end(submission)
            self._inbox.put(("cancel", submission))

    def _expire(self, submission: Submission, deadline: Deadline) -> None:
        self.release(submission)
        submission.events.put(deadline.passed())

    def _end(self, submission: Submission) -> None:
        self._open.discard(submission)
        if submission.timer is not None:
            submission.timer.cancel()

    def _run(self) -> None:
        failure = EngineFailure("the engine was shut down")
        try:
            while self._failure is None and self._take_commands():
                self._step()
        except Exception as error:
            logger.exception("the engine failed with %d requests in flight", len(self._decoding))
            failure = EngineFailure("the engine has failed")
            failure.__cause__ = error
        self._step_began = None
        self._failure = self._failure or failure
        self._on_loop(self._fail, failure)

    def _take_commands(self) -> bool:
        """Apply what has arrived, waiting for a command only when there is nothing to decode; False to stop."""
        while not self._decoding or not self._inbox.empty():
            command = self._inbox.get()
            if command is None:
                return False
            kind, submission = command
            if kind == "submit":
                submission.engine_id = self._engine.submit(submission.request)
                self._decoding[submission.engine_id] = submission
            elif submission.engine_id is not None and self._decoding.pop(submission.engine_id, None) is not None:
                self._engine.cancel(submission.engine_id)
                self._metrics.occupancy(self._engine.active, self._engine.waiting, self._engine.pool)
        return True

    def _step(self) -> None:
        self._step_began = time.monotonic()
        events = self._engine.step()
        self._step_began = None
        due = time.monotonic() - self._told_at > GATHER_S
        for event in events:
            submission = self._decoding[event.request_id]
            self._untold.append((submission, event))
            is_last = event.completion is not None or event.error is not None
            due = due or is_last or submission.urgent or not submission.begun
            submission.begun = True
            if is_last:
                del self._decoding[event.request_id]
        self._metrics.stepped(self._engine.active, self._engine.waiting, self._engine.pool)
        if due and self._untold:
            self._on_loop(self._deliver, self._untold)
            self._untold, self._told_at = [], time.monotonic()

    def _on_loop(self, callback: Callable[[Any], None], argument: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, argument)

    def _deliver(self, batch: list[tuple[Submission, Event]]) -> None:
        for submission, event in batch:
            if event.completion is not None or event.error is not None:
                self._end(submission)
            submission.events.put(event)

    def _fail(self, failure: EngineFailure) -> None:
        self._failure = self._failure or failure
        for submission in list(self._open):
            self._end(submission)
            submission.events.put(failure)
