"""The two ways in which a connection fails an answer: its client leaves, or reads too slowly."""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("d3llm_ray.serving")


class EndsWithClient:
    """Cancels the handling of a request whose client has left, whatever it waits for.

    Serve does so by itself; uvicorn only tells, and nobody listens while an answer as JSON is being made.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None
        complete, left = asyncio.Event(), asyncio.Event()

        async def read() -> Message:
            if complete.is_set():
                await left.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            if not message.get("more_body", False):
                complete.set()
            return message

        async def watch() -> None:
            await complete.wait()  # until then the application reads
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()
            task.cancel()

        async def answering(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                watcher.cancel()  # what comes after it is no leaving
            await send(message)

        watcher = asyncio.create_task(watch())
        try:
            await self._app(scope, read, answering)
        except asyncio.CancelledError:
            if not left.is_set() or task.uncancel() > 0:
                raise
        finally:
            watcher.cancel()


def patient(send: Send, limit_s: float) -> Send:
    """A `send` that ends the connection of a client who has not taken what was sent before for `limit_s` seconds."""

    async def limited(message: Message) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await send(message)
        except TimeoutError:
            logger.info("a client has not read for %g s: its connection is ended", limit_s)
            _abort(send)

    return limited


def _abort(send: Send) -> None:
    """End a connection at once; the application then hears that its client has left.

    ASGI has no word for it: whoever returns or raises waits until the client has taken what is buffered, or for ever.
    """
    transport = getattr(getattr(send, "__self__", None), "transport", None)  # uvicorn's, of both its protocols
    if transport is None:
        raise OSError("the client does not read")
    transport.abort()


class EndsSlowReaders:
    """Gives every client `limit_s` seconds to take what was sent to it."""

    def __init__(self, app: ASGIApp, limit_s: float) -> None:
        self._app = app
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, patient(send, self._limit_s))
