"""Answers sent while they grow: server-sent events (WHATWG HTML, section 9.2) as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from d3llm_ray.serving.choices import Answers

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class AnswerStream(StreamingResponse):
    """A stream of answers that closes them also when the client leaves between two events."""

    def __init__(self, answers: Answers, content: AsyncIterator[str]) -> None:
        super().__init__(content, media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()
