"""The answer to one request, as it grows: what each event of the engine brings, and how the answer ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from d3llm_ray.decoding import Event
from d3llm_ray.decoding.request import Reveal
from d3llm_ray.decoding.text import CommittedText
from d3llm_ray.metrics import ServingMetrics
from d3llm_ray.serving.deadline import DeadlinePassed
from d3llm_ray.serving.errors import ApiError, out_of_time
from d3llm_ray.serving.replies import FinishReason, Usage
from d3llm_ray.serving.worker import EngineFailure, Submission


@dataclass(frozen=True)
class CommittedToken:
    """A token of the answer, with log probabilities from the forward that revealed it where that is asked for."""

    token_id: int
    logprob: float | None = None
    alternatives: Sequence[tuple[int, float]] = ()  # token ids, the most probable first


@dataclass(frozen=True)
class Piece:
    """What has come of an answer: text and tokens that are certain now, and what a forward revealed if that is asked.

    Text may be held back that its tokens already have; the tokens of a stop string belong to an answer.
    """

    text: str
    reveal: Reveal | None = None
    tokens: Sequence[CommittedToken] = ()


class Answer:
    """The answer to one request, as it grows. Close it however it ends.

    `usage` and `finish_reason` are set at its end.
    """

    def __init__(self, submission: Submission, text: CommittedText, metrics: ServingMetrics) -> None:
        self.finish_reason: FinishReason | None = None
        self.usage: Usage | None = None
        self._submission = submission
        self._text = text
        self._metrics = metrics
        self._arrived = time.monotonic()
        self._started = False
        self._closed = False
        self._revealed: dict[int, CommittedToken] = {}  # by position, until it is committed
        self._told = 0  # tokens in pieces
        self._unfinished = metrics.aborted  # how an answer that does not end is counted

    @property
    def ready(self) -> bool:
        """Whether its end, or an event that may bring a piece, has come."""
        return self.finish_reason is not None or len(self._submission.events) > 0

    async def next(self) -> Piece | None:
        """The next piece, never empty, or None at the end. Raises `ApiError` when the engine fails or time is up."""
        while self.finish_reason is None:
            event = await self._next_event()
            self._note_reveal(event.reveal)
            text = self._text.push(event.token_ids)
            tokens = self._committed(event.token_ids)
            if event.completion is not None:
                text += self._text.finish()
            if self._text.stopped:
                self._end("stop", event.forwards)
            elif event.completion is not None:
                self._end("stop" if event.completion.finish_reason == "stop" else "length", event.forwards)
            if text:
                self._note_first()
            if text or tokens or event.reveal is not None:
                return Piece(text, event.reveal, tokens)
        return None

    def _note_reveal(self, reveal: Reveal | None) -> None:
        if reveal is not None:
            told = zip(reveal.positions, reveal.token_ids, reveal.logprobs, reveal.tops, strict=True)
            for position, token, logprob, tops in told:
                self._revealed[position] = CommittedToken(token, logprob, tops)

    def _committed(self, token_ids: Sequence[int]) -> list[CommittedToken]:
        """The tokens that are new, those behind a stop string left out."""
        new = token_ids[: self._text.tokens - self._told]
        begin, self._told = self._told, self._told + len(new)
        return [self._revealed.pop(place, CommittedToken(token)) for place, token in enumerate(new, begin)]

    async def _next_event(self) -> Event:
        try:
            event = await self._submission.next_event()
        except EngineFailure as error:
            self._unfinished = self._metrics.failed
            raise ApiError(500, f"{error}; ask again", code="engine_failed") from error
        except DeadlinePassed as error:
            self._unfinished = self._metrics.timed_out
            raise out_of_time(error) from error
        if event.error is not None:
            self._unfinished = self._metrics.failed
            raise ApiError(500, event.error, code="decoding_failed")
        return event

    def close(self) -> None:
        """Free the slot if the answer is not complete."""
        if self._closed:
            return
        self._closed = True
        self._submission.close()
        if self.finish_reason is None:
            self._unfinished()

    def _note_first(self) -> None:
        if not self._started:
            self._started = True
            self._metrics.first_text(time.monotonic() - self._arrived)

    def _end(self, reason: FinishReason, forwards: int) -> None:
        self.finish_reason = reason
        self.usage = Usage.count(len(self._submission.request.prompt_ids), self._text.tokens, forwards)
        seconds = time.monotonic() - self._arrived
        self._metrics.finished(reason, self.usage.prompt_tokens, self.usage.completion_tokens, forwards, seconds)
