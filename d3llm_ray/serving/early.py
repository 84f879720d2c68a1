"""A request's body beside its head.

A replica of Serve asks the proxy for the body by a call of its own when the request has come: a way there and back
before anything begins. What is small and has come whole goes with the head instead, in the ASGI scope.
"""

from __future__ import annotations

from starlette.types import Receive, Scope

from d3llm_ray.serving.exchange import again, replay

MOST_BYTES = 65_536  # of a body that goes with the head
_EXTENSION = "d3llm.body"


async def with_body(scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
    """In the proxy: the request with its body in the scope, where that is small and comes as one message."""
    message = await receive()
    body = message.get("body", b"")
    if message["type"] == "http.request" and not message.get("more_body", False) and len(body) <= MOST_BYTES:
        return {**scope, "extensions": {**(scope.get("extensions") or {}), _EXTENSION: body}}, receive
    return scope, again(message, receive)


def with_early_body(scope: Scope, receive: Receive) -> Receive:
    """In the replica: a `receive` that begins with the body in the scope, where there is one."""
    body = (scope.get("extensions") or {}).get(_EXTENSION)
    return receive if body is None else replay(body, receive)
