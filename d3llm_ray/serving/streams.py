"""Answers sent while they grow: server-sent events (WHATWG HTML, section 9.2) as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from d3llm_ray.serving.choices import Answers

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
Part = tuple[str, bool]  # text to send at once, and whether more comes


class AnswerStream(StreamingResponse):
    """A stream of answers that closes them however it ends.

    Its parts are as few as may be, and the last one says that it is: each is a message that Ray Serve carries from the
    replica to its proxy. A client that leaves is seen by `connections.EndsWithClient`, and by it alone.
    """

    def __init__(self, answers: Answers, parts: AsyncIterator[Part]) -> None:
        super().__init__((), media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._answers, self._parts = answers, parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for text, more in self._parts:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
        finally:
            self._answers.close()
