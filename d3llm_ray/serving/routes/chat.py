"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence

from fastapi import APIRouter

from d3llm_ray.serving.answers import Piece
from d3llm_ray.serving.choices import Answers
from d3llm_ray.serving.openapi import DECODES, errors, or_stream
from d3llm_ray.serving.replies import (
    AssistantMessage,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    ChunkDelta,
    TokenLogprob,
    TopLogprob,
)
from d3llm_ray.serving.routes.answering import respond
from d3llm_ray.serving.schemas import CHAT, ChatRequest
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.streams import AnswerStream

REPLACEMENT = "\ufffd"  # what a tokenizer decodes a part of a character to


def router(service: ChatService) -> APIRouter:
    routes = APIRouter()

    @routes.post(CHAT, response_model=ChatCompletion, responses={**or_stream("ChatChunk"), **errors(*DECODES)})
    async def chat(body: ChatRequest) -> ChatCompletion | AnswerStream:
        """Answer a conversation."""
        return await respond(service, body, ChatWriter(service, body))

    return routes


class ChatWriter:
    """Chat answers as OpenAI writes them."""

    def __init__(self, service: ChatService, request: ChatRequest) -> None:
        self._service, self._request = service, request
        name = request.model
        self._base = ChatChunk(id=f"chatcmpl-{uuid.uuid4().hex}", created=int(time.time()), model=name, choices=[])

    def opening(self) -> Sequence[ChatChunk]:
        role = ChunkDelta(role="assistant", content="")
        return [self._chunk(ChunkChoice(index=index, delta=role)) for index in range(self._request.choices)]

    def piece(self, index: int, piece: Piece) -> ChatChunk | None:
        shown = self._service.revealed(piece.reveal) if piece.reveal and self._request.wants_events else None
        logprobs = self._logprobs([piece]) if piece.tokens else None
        if not piece.text and shown is None and logprobs is None:
            return None
        choice = ChunkChoice(index=index, delta=ChunkDelta(content=piece.text), logprobs=logprobs)
        return self._chunk(choice).model_copy(update={"diffusion": shown})

    def end(self, index: int, answers: Answers) -> ChatChunk:
        reason = answers.answers[index].finish_reason
        return self._chunk(ChunkChoice(index=index, delta=ChunkDelta(), finish_reason=reason))

    def usage(self, answers: Answers) -> ChatChunk:
        return self._base.model_copy(update={"usage": answers.usage()})

    def whole(self, pieces: Sequence[Sequence[Piece]], answers: Answers) -> ChatCompletion:
        choices = []
        for index, (parts, answer) in enumerate(zip(pieces, answers.answers, strict=True)):
            assert answer.finish_reason is not None
            message = AssistantMessage(content="".join(piece.text for piece in parts))
            logprobs = self._logprobs(parts)
            choices.append(Choice(index=index, message=message, finish_reason=answer.finish_reason, logprobs=logprobs))
        return ChatCompletion(
            id=self._base.id,
            created=self._base.created,
            model=self._base.model,
            choices=choices,
            usage=answers.usage(),
        )

    def _chunk(self, choice: ChunkChoice) -> ChatChunk:
        return self._base.model_copy(update={"choices": [choice]})

    def _logprobs(self, pieces: Iterable[Piece]) -> ChoiceLogprobs | None:
        if self._request.alternatives is None:
            return None
        content = []
        for token in (token for piece in pieces for token in piece.tokens):
            assert token.logprob is not None
            tops = [self._top(*alternative) for alternative in token.alternatives]
            chosen = self._top(token.token_id, token.logprob)
            content.append(TokenLogprob(**chosen.model_dump(), top_logprobs=tops))
        return ChoiceLogprobs(content=content)

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        text = self._service.texts.token(token_id)
        return TopLogprob(token=text, logprob=logprob, bytes=None if REPLACEMENT in text else list(text.encode()))
