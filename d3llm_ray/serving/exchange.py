"""One HTTP exchange with an ASGI application as data: a body goes in, messages come out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.types import ASGIApp, Message, Receive, Scope

logger = logging.getLogger("d3llm_ray.serving")
_MOST_AHEAD = 16  # messages that an application may be ahead of who reads them


async def whole_body(receive: Receive) -> bytes:
    """A request's body; of a client that leaves meanwhile, what has come."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body which has been read, and then what `receive` gives."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


async def exchange(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
    """The messages of an application's answer. Closing the iterator tells the application that its client has left."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue(_MOST_AHEAD)
    forever: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    async def run() -> None:
        try:
            await app(scope, replay(body, lambda: forever), messages.put)
        except Exception:
            logger.exception("a route failed")  # its answer, if there is one, has been sent: a 500, or half an answer
        await messages.put(None)

    task = asyncio.create_task(run())
    try:
        while (message := await messages.get()) is not None:
            yield message
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def collect(app: ASGIApp, scope: Scope) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to a request without a body."""
    status, headers, parts = 0, {}, []
    async with aclosing(exchange(app, scope, b"")) as messages:
        async for message in messages:
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
            else:
                parts.append(message.get("body", b""))
    return status, headers, b"".join(parts)
