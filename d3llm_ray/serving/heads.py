"""How much a client may send before anybody looks at it: the head of a request, and how long it may take to come.

uvicorn's parser holds a head of any size in memory, and a connection that sends nothing for ever. In Ray Serve that is
the proxy's memory, whoever asks.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from d3llm_ray.serving.errors import ApiError

MAX_HEAD_BYTES = 32_768
MAX_HEADERS = 100
HEAD_WITHIN_S = 30.0


def head_too_large() -> ApiError:
    accepted = f"at most {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers"
    return ApiError(431, f"headers: too large or too many; accepted: {accepted}", code="headers_too_large")


class HeadLimit:
    """ASGI middleware: refuses a request whose path and headers are too large or too many."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = scope["headers"]
            size = len(scope["path"]) + len(scope["query_string"])
            size += sum(len(name) + len(value) for name, value in headers)
            if size > MAX_HEAD_BYTES or len(headers) > MAX_HEADERS:
                raise head_too_large()
        await self._app(scope, receive, send)


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's connection, ended when a head (or what comes between the parts of a body) grows without an end.

    A head must be complete `HEAD_WITHIN_S` after its connection was made, or after its first byte.
    """

    _unread = 0  # bytes since the parser last made a request, or a part of a body, of them
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        super().data_received(data)
        if self._unread > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._hang_up(head_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._head_is_there()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's own, of what is no HTTP, would be plain text."""
        self._hang_up(ApiError(400, f"request: {msg}", code="invalid_http"))

    def _expect_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_WITHIN_S, self.transport.close)

    def _head_is_there(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _hang_up(self, error: ApiError) -> None:
        if self.cycle is None or self.cycle.response_complete:  # no answer is on its way
            self.transport.write(_raw(error))
        self.transport.close()


def _raw(error: ApiError) -> bytes:
    response = error.response()
    headers: list[tuple[bytes, Any]] = [*response.raw_headers, (b"connection", b"close")]
    first = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()
    return b"\r\n".join([first, *(b"%s: %s" % header for header in headers), b"", bytes(response.body)])
