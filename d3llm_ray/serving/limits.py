"""What guards a replica's routes: the size of a body, and the room for another request."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d3llm_ray.serving.schemas import DECODING
from d3llm_ray.serving.service import ChatService


class BodyLimit:
    """Stops reading a request body at `limit` bytes (FastAPI's own limit answers in plain text)."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                raise HTTPException(413, f"body: too large; accepted: at most {self._limit} bytes")
            return message

        await self._app(scope, limited, send)


class RefusesWhenFull:
    """Answers a request to decode that there is no room for before its body is read."""

    def __init__(self, app: ASGIApp, service: ChatService) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith(DECODING) and scope["method"] == "POST":
            self._service.check_room()
        await self._app(scope, receive, send)
