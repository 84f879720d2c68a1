"""`POST /v1/completions`: prompts without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from fastapi import APIRouter

from d3llm_ray.serving.answers import CommittedToken, Piece
from d3llm_ray.serving.choices import Answers
from d3llm_ray.serving.openapi import DECODES, errors, or_stream
from d3llm_ray.serving.replies import TextChoice, TextChunk, TextCompletion, TextLogprobs
from d3llm_ray.serving.routes.answering import respond
from d3llm_ray.serving.schemas import COMPLETIONS, CompletionRequest
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.streams import AnswerStream


def router(service: ChatService) -> APIRouter:
    routes = APIRouter()

    @routes.post(COMPLETIONS, response_model=TextCompletion, responses={**or_stream("TextChunk"), **errors(*DECODES)})
    async def completions(body: CompletionRequest) -> TextCompletion | AnswerStream:
        """Answer prompts as they are: a text, token ids, or a list of either."""
        echoed = [await _echo(service, prompt) for prompt in body.prompt] if body.echo else [""] * body.prompts
        return await respond(service, body, TextWriter(service, body, echoed))

    return routes


async def _echo(service: ChatService, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else await service.texts.decoded(prompt, "echo")


class TextWriter:
    """Completions as OpenAI writes them. `echoed` has for each prompt what its answers begin with."""

    def __init__(self, service: ChatService, request: CompletionRequest, echoed: Sequence[str]) -> None:
        self._service, self._request = service, request
        self._shows_ids = request.return_token_ids or service.llm.tokenizer is None
        self._echoed = [text for text in echoed for _ in range(request.choices)]
        self._offsets = [0] * len(self._echoed)  # characters of an answer's tokens so far
        name = request.model
        self._base = TextChunk(id=f"cmpl-{uuid.uuid4().hex}", created=int(time.time()), model=name, choices=[])

    def opening(self) -> Sequence[TextChunk]:
        texts = enumerate(self._echoed)
        return [self._chunk(TextChoice(index=index, text=text)) for index, text in texts if text]

    def piece(self, index: int, piece: Piece) -> TextChunk | None:
        shown = self._service.revealed(piece.reveal) if piece.reveal and self._request.wants_events else None
        tells_tokens = bool(piece.tokens) and (self._shows_ids or self._request.alternatives is not None)
        if not piece.text and shown is None and not tells_tokens:
            return None
        return self._chunk(self._choice(index, piece.text, piece.tokens)).model_copy(update={"diffusion": shown})

    def end(self, index: int, answers: Answers) -> TextChunk:
        return self._chunk(TextChoice(index=index, text="", finish_reason=answers.answers[index].finish_reason))

    def usage(self, answers: Answers) -> TextChunk:
        return self._base.model_copy(update={"usage": answers.usage()})

    def whole(self, pieces: Sequence[Sequence[Piece]], answers: Answers) -> TextCompletion:
        choices = []
        for index, (parts, answer) in enumerate(zip(pieces, answers.answers, strict=True)):
            text = self._echoed[index] + "".join(piece.text for piece in parts)
            choice = self._choice(index, text, [token for piece in parts for token in piece.tokens])
            choices.append(choice.model_copy(update={"finish_reason": answer.finish_reason}))
        return TextCompletion(
            id=self._base.id,
            created=self._base.created,
            model=self._base.model,
            choices=choices,
            usage=answers.usage(),
        )

    def _chunk(self, choice: TextChoice) -> TextChunk:
        return self._base.model_copy(update={"choices": [choice]})

    def _choice(self, index: int, text: str, tokens: Sequence[CommittedToken]) -> TextChoice:
        ids = [token.token_id for token in tokens] if self._shows_ids else None
        return TextChoice(index=index, text=text, token_ids=ids, logprobs=self._logprobs(index, tokens))

    def _logprobs(self, index: int, tokens: Sequence[CommittedToken]) -> TextLogprobs | None:
        if self._request.alternatives is None:
            return None
        told = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token in tokens:
            assert token.logprob is not None
            text = self._service.texts.token(token.token_id)
            told.tokens.append(text)
            told.token_logprobs.append(token.logprob)
            others = {self._service.texts.token(other): logprob for other, logprob in token.alternatives}
            told.top_logprobs.append(others | {text: token.logprob})
            told.text_offset.append(self._offsets[index])
            self._offsets[index] += len(text)
        return told
