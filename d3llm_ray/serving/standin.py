"""What clients hear in place of Serve's own answers, which are plain text and call a draining model unknown.

An answer is Serve's own when it lacks the header by which replicas tell their room. Serve gives one for a route that it
has taken down while answers are still being finished, and one, or none at all, for a request whose replica has died.
"""

from __future__ import annotations

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Send

from d3llm_ray.serving.access_log import REQUEST_ID
from d3llm_ray.serving.errors import RETRY_AFTER_S, ApiError
from d3llm_ray.serving.sse import sse

DRAINING = ApiError(
    503, "the server is stopping; ask again later", code="draining", retry_after_s=RETRY_AFTER_S
).response()
# Liveness: what is being finished must not be cut off by an orchestrator that takes the server for dead.
ALIVE = JSONResponse({"status": "ok"})
LOST = ApiError(
    503, "the replica that had this request is gone; ask again", code="replica_lost", retry_after_s=RETRY_AFTER_S
)


class StandIn:
    """A `send` that puts an answer of ours in the place of Serve's own, and ends a stream that Serve has left.

    `taken_down` stands in for Serve's 404; None leaves that as it is.
    """

    def __init__(self, send: Send, header: str, taken_down: Response | None, request_id: bytes) -> None:
        self._send, self._header, self._taken_down, self._id = send, header.encode(), taken_down, request_id
        self._begun = self._streams = self._replaced = self._ended = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._start(message)
        elif not self._replaced:
            self._ended = not message.get("more_body", False)
            await self._send(message)

    async def _start(self, message: Message) -> None:
        self._begun = True
        headers = dict(message["headers"])
        status = message["status"]
        self._streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        own: Response | None = None
        if self._header not in headers:
            own = self._taken_down if status == 404 else LOST.response() if status >= 500 else None
        self._replaced = own is not None
        await (self._send(message) if own is None else self._answer(own))

    async def _answer(self, response: Response) -> None:
        headers = [*response.raw_headers, (REQUEST_ID, self._id)]
        await self._send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await self._send({"type": "http.response.body", "body": bytes(response.body)})

    async def close(self) -> None:
        """Call it when Serve is done, or has failed: who has no answer yet, or no end of a stream, is told why."""
        if not self._begun:
            await self._answer(LOST.response())
        elif self._streams and not self._ended:
            self._ended = True
            await self._send({"type": "http.response.body", "body": sse(LOST.body()).encode()})
