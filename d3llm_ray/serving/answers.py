"""The answer to one request, as it grows: what each event of the engine brings, and how the answer ends."""

from __future__ import annotations

import time
from dataclasses import dataclass

from d3llm_ray.decoding import Event
from d3llm_ray.decoding.request import Reveal
from d3llm_ray.decoding.text import CommittedText
from d3llm_ray.metrics import ServingMetrics
from d3llm_ray.serving.errors import ApiError
from d3llm_ray.serving.replies import FinishReason, Usage
from d3llm_ray.serving.worker import EngineFailure, Submission


@dataclass(frozen=True)
class Piece:
    """What has come of an answer: text that is certain now, and what a forward revealed where that is asked for."""

    text: str
    reveal: Reveal | None = None


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
        self._failed = False

    async def next(self) -> Piece | None:
        """The next piece, never empty, or None at the end. Raises `ApiError` when the engine fails."""
        while self.finish_reason is None:
            event = await self._next_event()
            text = self._text.push(event.token_ids)
            if event.completion is not None:
                text += self._text.finish()
            if self._text.stopped:
                self._end("stop", event.forwards)
            elif event.completion is not None:
                self._end("stop" if event.completion.finish_reason == "stop" else "length", event.forwards)
            if text:
                self._note_first()
            if text or event.reveal is not None:
                return Piece(text, event.reveal)
        return None

    async def _next_event(self) -> Event:
        try:
            event = await self._submission.next_event()
        except EngineFailure as error:
            self._failed = True
            raise ApiError(500, f"{error}; ask again", code="engine_failed") from error
        if event.error is not None:
            self._failed = True
            raise ApiError(500, event.error, code="decoding_failed")
        return event

    def close(self) -> None:
        """Free the slot if the answer is not complete."""
        if self._closed:
            return
        self._closed = True
        self._submission.close()
        if self._failed:
            self._metrics.failed()
        elif self.finish_reason is None:
            self._metrics.aborted()

    def _note_first(self) -> None:
        if not self._started:
            self._started = True
            self._metrics.first_text(time.monotonic() - self._arrived)

    def _end(self, reason: FinishReason, forwards: int) -> None:
        self.finish_reason = reason
        self.usage = Usage.count(len(self._submission.request.prompt_ids), self._text.tokens, forwards)
        seconds = time.monotonic() - self._arrived
        self._metrics.finished(reason, self.usage.prompt_tokens, self.usage.completion_tokens, forwards, seconds)
