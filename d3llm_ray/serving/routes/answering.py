"""What the routes that decode share: one JSON body, or a stream of events, of all answers to a request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import Generic, Protocol, TypeVar

from d3llm_ray.serving.answers import Piece
from d3llm_ray.serving.choices import Answers
from d3llm_ray.serving.errors import to_api_error
from d3llm_ray.serving.replies import ChatChunk, TextChunk
from d3llm_ray.serving.schemas import GenerationRequest
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.sse import DONE, sse
from d3llm_ray.serving.streams import AnswerStream, Part

Body = TypeVar("Body", covariant=True)
Came = tuple[int, Piece | None]  # which answer, and its next piece or None at its end


class Writer(Protocol, Generic[Body]):
    """Puts the pieces of answers into the bodies of a route."""

    def opening(self) -> Sequence[ChatChunk | TextChunk]:
        """What a stream begins with."""

    def piece(self, index: int, piece: Piece) -> ChatChunk | TextChunk | None:
        """The event of a piece, or None where it has nothing that was asked for."""

    def end(self, index: int, answers: Answers) -> ChatChunk | TextChunk:
        """The event of an answer's end."""

    def usage(self, answers: Answers) -> ChatChunk | TextChunk:
        """The event that tells the usage of all answers."""

    def whole(self, pieces: Sequence[Sequence[Piece]], answers: Answers) -> Body:
        """The body of complete answers, from the pieces of each."""


async def respond(service: ChatService, request: GenerationRequest, writer: Writer[Body]) -> Body | AnswerStream:
    """Answer a request in one of the two ways; `ApiError` where it is refused or fails before the first byte."""
    answers = await service.open(request)
    with ExitStack() as cleanup:
        cleanup.callback(answers.close)  # also when the client leaves, which cancels this task
        # Until the first piece there is still a status code to refuse with.
        came = await answers.next()
        if request.stream:
            cleanup.pop_all()  # the stream closes its answers
            return AnswerStream(answers, _parts(request, answers, came, writer))
        pieces: list[list[Piece]] = [[] for _ in answers.answers]
        while came is not None:
            index, piece = came
            if piece is not None:
                pieces[index].append(piece)
            came = await answers.next()
        return writer.whole(pieces, answers)


async def _parts(
    request: GenerationRequest, answers: Answers, came: Came | None, writer: Writer[Body]
) -> AsyncIterator[Part]:
    """Server-sent events of all answers, those that come together as one part.

    An error after the first byte is an event; the stream then lacks `[DONE]`.
    """
    show_usage = request.wants_stream_usage
    events = [sse(chunk, show_usage=show_usage) for chunk in writer.opening()]
    try:
        while came is not None:
            index, piece = came
            event = writer.end(index, answers) if piece is None else writer.piece(index, piece)
            if event is not None:
                events.append(sse(event, show_usage=show_usage))
            if events and not answers.ready:
                yield "".join(events), True
                events = []
            came = await answers.next()
    except Exception as error:
        yield "".join((*events, sse(to_api_error(error).body()))), False
        return
    if show_usage:
        events.append(sse(writer.usage(answers), show_usage=True))
    yield "".join((*events, DONE)), False
