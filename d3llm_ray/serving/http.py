"""The HTTP routes over one `ChatService`, as a FastAPI application that knows nothing of Ray."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from d3llm_ray import __version__
from d3llm_ray.serving.answers import Answer, Piece
from d3llm_ray.serving.errors import ApiError, install_handlers, to_api_error
from d3llm_ray.serving.limits import BodyLimit, RefusesWhenFull
from d3llm_ray.serving.playground import playground
from d3llm_ray.serving.replies import (
    AssistantMessage,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChunkChoice,
    ChunkDelta,
    ModelCard,
    ModelList,
)
from d3llm_ray.serving.schemas import CHAT, HEALTH, ChatRequest
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.sse import DONE, sse
from d3llm_ray.serving.streams import AnswerStream


def create_app(service: ChatService) -> FastAPI:
    """Routes: `POST /v1/chat/completions`, `GET /v1/models`, `GET /v1/models/{id}`, `GET /health`; the page at `/`."""
    app = FastAPI(title="d3llm-ray", version=__version__)
    app.add_middleware(BodyLimit, limit=service.settings.max_body_bytes)
    app.add_middleware(RefusesWhenFull, service=service)  # the outer one
    install_handlers(app)
    app.include_router(playground())

    @app.post(CHAT, response_model=ChatCompletion)
    async def chat(body: ChatRequest) -> ChatCompletion | AnswerStream:
        answer = await service.open(body)
        with ExitStack() as cleanup:
            cleanup.callback(answer.close)  # also when the client leaves, which cancels this task
            # Until the first piece there is still a status code to refuse with.
            first = await answer.next()
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


async def _completion(service: ChatService, answer: Answer, first: Piece | None) -> ChatCompletion:
    parts: list[str] = []
    piece = first
    while piece is not None:
        parts.append(piece.text)
        piece = await answer.next()
    assert answer.finish_reason is not None and answer.usage is not None
    choice = Choice(message=AssistantMessage(content="".join(parts)), finish_reason=answer.finish_reason)
    return ChatCompletion(
        id=_new_id(), created=int(time.time()), model=service.settings.model_id, choices=[choice], usage=answer.usage
    )


async def _events(service: ChatService, body: ChatRequest, answer: Answer, first: Piece | None) -> AsyncIterator[str]:
    """Server-sent events of one answer. An error after the first byte is an event; the stream then lacks `[DONE]`."""
    base = ChatChunk(id=_new_id(), created=int(time.time()), model=service.settings.model_id, choices=[])
    show_usage = body.wants_stream_usage

    def event(delta: ChunkDelta, finish_reason: str | None = None, piece: Piece | None = None) -> str:
        choice = ChunkChoice.model_validate({"delta": delta, "finish_reason": finish_reason})
        shown = None if piece is None or piece.reveal is None else service.revealed(piece.reveal)
        return sse(base.model_copy(update={"choices": [choice], "diffusion": shown}), show_usage=show_usage)

    yield event(ChunkDelta(role="assistant", content=""))
    try:
        piece = first
        while piece is not None:
            yield event(ChunkDelta(content=piece.text), piece=piece)
            piece = await answer.next()
    except Exception as error:
        yield sse(to_api_error(error).body())
        return
    yield event(ChunkDelta(), answer.finish_reason)
    if show_usage:
        yield sse(base.model_copy(update={"usage": answer.usage}), show_usage=True)
    yield DONE
