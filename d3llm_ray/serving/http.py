"""The HTTP routes over one `ChatService`, as a FastAPI application that knows nothing of Ray."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack

from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d3llm_ray import __version__
from d3llm_ray.serving.errors import ApiError, install_handlers, to_api_error
from d3llm_ray.serving.schemas import (
    CHAT,
    HEALTH,
    AssistantMessage,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChunkChoice,
    ChunkDelta,
    ModelCard,
    ModelList,
)
from d3llm_ray.serving.service import Answer, ChatService
from d3llm_ray.serving.sse import DONE, sse

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class AnswerStream(StreamingResponse):
    """A stream of an answer that closes it also when the client leaves between two events."""

    def __init__(self, answer: Answer, content: AsyncIterator[str]) -> None:
        super().__init__(content, media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


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
    """Answers a chat request that there is no room for before its body is read."""

    def __init__(self, app: ASGIApp, service: ChatService) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith(CHAT) and scope["method"] == "POST":
            try:
                self._service.check_room()
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def create_app(service: ChatService) -> FastAPI:
    """Routes: `POST /v1/chat/completions`, `GET /v1/models`, `GET /v1/models/{id}`, `GET /health`."""
    app = FastAPI(title="d3llm-ray", version=__version__)
    app.add_middleware(BodyLimit, limit=service.settings.max_body_bytes)
    app.add_middleware(RefusesWhenFull, service=service)  # the outer one
    install_handlers(app)

    @app.post(CHAT, response_model=ChatCompletion)
    async def chat(body: ChatRequest) -> ChatCompletion | AnswerStream:
        answer = await service.open(body)
        with ExitStack() as cleanup:
            cleanup.callback(answer.close)  # also when the client leaves, which cancels this task
            # Until the first text there is still a status code to refuse with.
            first = await answer.next_text()
            if body.stream:
                cleanup.pop_all()  # the stream closes its answer
                return AnswerStream(answer, _events(service, body, answer, first))
            return await _completion(service, answer, first)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[service.card()])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        service.check_model(name)
        return service.card()

    @app.get(HEALTH)
    async def health() -> JSONResponse:
        problem = service.worker.problem()
        if problem is not None:
            raise ApiError(503, problem, code="unhealthy")
        return JSONResponse({"status": "ok"})

    return app


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


async def _completion(service: ChatService, answer: Answer, first: str | None) -> ChatCompletion:
    parts: list[str] = []
    text = first
    while text is not None:
        parts.append(text)
        text = await answer.next_text()
    assert answer.finish_reason is not None and answer.usage is not None
    choice = Choice(message=AssistantMessage(content="".join(parts)), finish_reason=answer.finish_reason)
    return ChatCompletion(
        id=_new_id(), created=int(time.time()), model=service.settings.model_id, choices=[choice], usage=answer.usage
    )


async def _events(service: ChatService, body: ChatRequest, answer: Answer, first: str | None) -> AsyncIterator[str]:
    """Server-sent events of one answer. An error after the first byte is an event; the stream then lacks `[DONE]`."""
    base = ChatChunk(id=_new_id(), created=int(time.time()), model=service.settings.model_id, choices=[])
    show_usage = body.wants_stream_usage

    def event(delta: ChunkDelta, finish_reason: str | None = None) -> str:
        choice = ChunkChoice.model_validate({"delta": delta, "finish_reason": finish_reason})
        return sse(base.model_copy(update={"choices": [choice]}), show_usage=show_usage)

    yield event(ChunkDelta(role="assistant", content=""))
    try:
        text = first
        while text is not None:
            yield event(ChunkDelta(content=text))
            text = await answer.next_text()
    except Exception as error:
        yield sse(to_api_error(error).body())
        return
    yield event(ChunkDelta(), answer.finish_reason)
    if show_usage:
        yield sse(base.model_copy(update={"usage": answer.usage}), show_usage=True)
    yield DONE
