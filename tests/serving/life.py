"""What the tests of a request's life share: a slow engine, what became of requests, bodies of long answers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import ASGIApp

from d3llm_ray.serving.schemas import CHAT
from d3llm_ray.serving.service import ChatService

# One token a forward to the end of the canvas: as many forwards as tokens.
ONE_BY_ONE = {"entropy_threshold": 0.0, "early_stop": False}


def long_body(content: str = "2 + 3 ?", **fields: Any) -> dict[str, Any]:
    """A request whose answer takes as many forwards as `max_tokens`, each an event of its stream."""
    messages = [{"role": "user", "content": content}]
    diffusion = {**ONE_BY_ONE, **({"events": True} if fields.get("stream") else {})}
    return {"model": "tiny-random", "messages": messages, "diffusion": diffusion, **fields}


def refused_unread(app: ASGIApp) -> Any:
    """The message that begins the answer to a chat request whose body must not be read."""
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body is read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    return sent[0]


def slow_down(service: ChatService, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Make every forward take that much longer."""
    step = service.llm.engine.step

    def slow() -> Any:
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(service.llm.engine, "step", slow)


def count_ends(service: ChatService, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts, from now on, of the requests that the service's metrics hear of: accepted ones, and ends by reason."""
    counted: Counter[str] = Counter()
    metrics = service._metrics
    for name in ("accepted", "aborted", "timed_out", "failed"):
        monkeypatch.setattr(metrics, name, lambda name=name: counted.update([name]))
    monkeypatch.setattr(metrics, "finished", lambda *_: counted.update(["finished"]))
    return counted


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """Seconds until the condition held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"it did not happen within {seconds:g} s"
        time.sleep(0.005)
    return time.monotonic() - began


def nothing_left(service: ChatService) -> bool:
    """Whether no request decodes, waits or is known."""
    engine = service.llm.engine
    return engine.active == engine.waiting == service.worker.in_flight == 0
