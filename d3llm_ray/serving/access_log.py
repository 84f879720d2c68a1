"""A request's id, and the line that is logged when it ends: one JSON object, without a prompt, an answer or a key.

The lines go to the logger `d3llm_ray.access`. In a replica of Ray Serve all loggers of this package write where Serve
writes; elsewhere they are Python's to direct.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("d3llm_ray.access")
logger.setLevel(logging.INFO)
REQUEST_ID = b"x-request-id"
_SANE_ID = re.compile(rb"[A-Za-z0-9._~:/+=@-]{1,128}")
_SHOWN = 200  # characters of a path or a model's name


@dataclass
class RequestRecord:
    """What is known of a request, in the order in which it is logged. Counts are sums over its answers."""

    time: str  # of arrival, UTC
    request_id: str
    method: str
    path: str
    status: int | None = None  # None: nothing was answered
    seconds: float = 0.0
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    forwards: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    disconnected: bool = False  # the client left before the end


_current: ContextVar[RequestRecord | None] = ContextVar("d3llm_ray_request", default=None)


def request_id() -> str | None:
    """The id of the request that is being answered, None outside of one."""
    record = _current.get()
    return None if record is None else record.request_id


def note_model(name: str) -> None:
    if record := _current.get():
        record.model = name[:_SHOWN]


def note_error(code: str) -> None:
    if record := _current.get():
        record.error = code


def note_answer(prompt_tokens: int, completion_tokens: int, forwards: int, finish_reason: str) -> None:
    """Add an answer that is complete; of several, the last one's reason is kept."""
    if record := _current.get():
        record.prompt_tokens = (record.prompt_tokens or 0) + prompt_tokens
        record.completion_tokens = (record.completion_tokens or 0) + completion_tokens
        record.forwards = (record.forwards or 0) + forwards
        record.finish_reason = finish_reason


def sane_request_id(scope: Scope) -> bytes:
    """The id that the client sent, where it is short and plain, else a fresh one."""
    sent = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"")
    return sent if _SANE_ID.fullmatch(sent) else uuid.uuid4().hex.encode()


def with_request_id(scope: Scope, value: bytes) -> Scope:
    """`scope` with this id as its only one."""
    headers = [(name, sent) for name, sent in scope["headers"] if name != REQUEST_ID]
    return {**scope, "headers": [*headers, (REQUEST_ID, value)]}


class RequestLog:
    """ASGI middleware: gives each request its id, and logs it when it ends.

    `echo`: whether to answer with the id. Ray Serve's proxy does so itself, and once is enough.
    """

    def __init__(self, app: ASGIApp, *, log: bool, echo: bool) -> None:
        self._app = app
        self._log = log
        self._echo = echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, sane = time.monotonic(), sane_request_id(scope)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = RequestRecord(now, sane.decode(), scope["method"], scope["path"][:_SHOWN])
        complete = False

        async def telling(message: Message) -> None:
            nonlocal complete
            if message["type"] == "http.response.start":
                record.status = message["status"]
                if self._echo:
                    MutableHeaders(scope=message)["X-Request-Id"] = record.request_id
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        async def listening() -> Message:
            message = await receive()
            record.disconnected |= message["type"] == "http.disconnect" and not complete
            return message

        token = _current.set(record)
        try:
            await self._app(with_request_id(scope, sane), listening, telling)
        except asyncio.CancelledError:
            record.disconnected |= not complete
            raise
        finally:
            _current.reset(token)
            record.seconds = round(time.monotonic() - began, 6)
            if self._log:
                logger.info("%s", json.dumps(vars(record)))


class _HandsOver(logging.Handler):
    """Hands records to another logger, whose handlers may change."""

    def __init__(self, to: str) -> None:
        super().__init__()
        self._to = logging.getLogger(to)

    def emit(self, record: logging.LogRecord) -> None:
        self._to.handle(record)


def log_through(name: str) -> None:
    """Let everything that this package logs be written as the logger `name` writes."""
    package = logging.getLogger("d3llm_ray")
    package.handlers, package.propagate = [_HandsOver(name)], False
