"""A client that leaves frees its slot within a forward, in whatever state its request is, and is counted once.

Over sockets: uvicorn tells of a disconnect, and nobody but us cancels a request for it.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from d3llm_ray.serving import local
from d3llm_ray.serving.service import ChatService
from tests.serving.life import count_ends, long_body, slow_down, wait_until
from tests.serving.raw_client import RawClient

STREAMS = 200


@pytest.fixture
def served(make_service: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Context manager: a slow service on a socket, its counts of ends, and its URL."""

    @contextmanager
    def serve(seconds: float, **settings: Any) -> Iterator[tuple[ChatService, Counter[str], str]]:
        service = make_service(**settings)
        slow_down(service, monkeypatch, seconds)
        counted = count_ends(service, monkeypatch)
        monkeypatch.setattr(local, "ChatService", lambda _: service)
        with local.serve_locally(service.settings) as url:
            yield service, counted, url

    return serve


def nothing_left(service: ChatService) -> bool:
    engine = service.llm.engine
    return engine.active == engine.waiting == service.worker.in_flight == 0


def ask_and_leave(url: str, service: ChatService, when: Any, body: dict[str, Any]) -> None:
    """Send a request, and leave as soon as `when` says so of the client."""

    async def main() -> None:
        client = await RawClient.ask(url, body)
        while not await when(client):
            await asyncio.sleep(0.005)
        client.leave()

    asyncio.run(asyncio.wait_for(main(), 20))


@pytest.mark.parametrize("stream", [False, True])
def test_while_it_is_decoded(served: Any, stream: bool) -> None:
    """As JSON in its first forward, prefilling; as a stream after the first event."""
    with served(0.2, max_batch_size=1) as (service, counted, url):
        engine = service.llm.engine

        async def when(client: RawClient) -> bool:
            return bool(await client.reader.readuntil(b'"forward"')) if stream else engine.steps > before

        before = engine.steps - (engine.active > 0)
        ask_and_leave(url, service, when, long_body(max_tokens=64, stream=stream))
        steps = engine.steps
        wait_until(lambda: nothing_left(service))
        assert engine.steps <= steps + 1  # one may have begun
        assert counted == {"accepted": 1, "aborted": 1}


def test_while_it_waits_for_a_slot(served: Any) -> None:
    with served(0.1, max_batch_size=1) as (service, counted, url):

        async def main() -> None:
            first = await RawClient.ask(url, long_body(max_tokens=32, stream=True))
            await first.reader.readuntil(b'"forward"')
            waiting = [await RawClient.ask(url, long_body(max_tokens=64, stream=stream)) for stream in (True, False)]
            while service.worker.in_flight < 3:
                await asyncio.sleep(0.005)
            for client in waiting:
                client.leave()
            await first.read_all()

        asyncio.run(asyncio.wait_for(main(), 20))
        steps = service.llm.engine.steps
        wait_until(lambda: nothing_left(service))
        assert service.llm.engine.steps == steps
        assert counted == {"accepted": 3, "aborted": 2, "finished": 1}


def test_while_it_is_tokenised(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(0, max_batch_size=1) as (service, counted, url):
        encode, begun, go = service.llm.encode, threading.Event(), threading.Event()

        def slow(messages: Any) -> Any:
            begun.set()
            assert go.wait(20)
            return encode(messages)

        monkeypatch.setattr(service.llm, "encode", slow)

        async def when(_: RawClient) -> bool:
            return begun.is_set()

        ask_and_leave(url, service, when, long_body(max_tokens=64))
        steps = service.llm.engine.steps
        time.sleep(0.2)  # the news is on its way
        go.set()
        time.sleep(0.3)
        assert (service.llm.engine.steps, dict(counted)) == (steps, {})  # it never came to the queue


def test_two_hundred_streams_closed_at_random(served: Any) -> None:
    """None keeps its slot, and each accepted one is counted once: as finished, or as aborted."""
    moments = random.Random(0)
    with served(0.005, max_batch_size=16, max_queue=STREAMS) as (service, counted, url):

        async def one() -> bool:
            await asyncio.sleep(moments.uniform(0, 1))
            client = await RawClient.ask(url, long_body(max_tokens=16, stream=moments.random() < 0.8))
            reading = asyncio.ensure_future(client.reader.read())
            await asyncio.wait([reading], timeout=moments.uniform(0, 3))
            client.leave()
            reading.cancel()
            return True

        async def main() -> None:
            assert await asyncio.gather(*(one() for _ in range(STREAMS))) == [True] * STREAMS

        asyncio.run(asyncio.wait_for(main(), 60))
        wait_until(lambda: nothing_left(service))
        wait_until(lambda: counted["accepted"] == counted["finished"] + counted["aborted"])
        assert set(counted) == {"accepted", "finished", "aborted"}
        assert min(counted["finished"], counted["aborted"]) > STREAMS // 20
        assert counted["accepted"] <= STREAMS  # some left before they were read
