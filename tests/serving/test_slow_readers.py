"""Clients that read slowly, or not at all: what waits for them is bounded, and their connections are ended."""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import time
import types
from typing import Any

import psutil
import pytest

from d3llm_ray.decoding import DiffusionLLM, Event
from d3llm_ray.decoding.request import Reveal
from d3llm_ray.serving import local
from d3llm_ray.serving.backlog import Backlog
from d3llm_ray.serving.http import create_app
from d3llm_ray.serving.schemas import CHAT
from tests.serving.life import long_body, nothing_left, wait_until
from tests.serving.raw_client import RawClient

BUFFER = 16_384  # bytes of a connection that the kernel keeps for either side, about; usually it is megabytes
NAME = "m" * 6000  # in every chunk of a stream


def test_events_that_wait_are_one_event() -> None:
    backlog = Backlog()
    reveal = Reveal(1, [0], [7], [0.5], [-0.1], 16, 16, 16, 0, [[]])
    for forward in (1, 2, 3):
        backlog.put(Event(5, [forward, 10 * forward], forward))
    backlog.put(Event(5, [4], 4, reveal=reveal))
    backlog.put(Event(5, [5], 5))
    backlog.put(Event(5, [6], 6, completion="the end"))  # type: ignore[arg-type]
    backlog.put(RuntimeError("late"))

    async def read() -> list[Any]:
        return [await backlog.get() for _ in range(4)]

    assert asyncio.run(read())[:3] == [
        Event(5, [1, 10, 2, 20, 3, 30], 3),
        Event(5, [4], 4, reveal=reveal),
        Event(5, [5, 6], 6, completion="the end"),  # type: ignore[arg-type]
    ]
    assert not backlog


def test_an_answer_that_waits_for_its_reader_waits_as_one_chunk(make_service: Any, tiny_checkpoint: Any) -> None:
    """Whoever reads again after the answer's end gets the rest at once, and the same text."""
    service = make_service(max_batch_size=1)
    body = {"model": "tiny-random", "messages": [{"role": "user", "content": "2 + 3 ?"}], "stream": True}
    body |= {"max_tokens": 128, "diffusion": {"entropy_threshold": 0.0}}
    (expected,) = DiffusionLLM.from_pretrained(tiny_checkpoint).generate(
        ["2 + 3 ?"], max_tokens=128, entropy_threshold=0.0
    )
    sent: list[str] = []

    async def main() -> None:
        service.start()
        reads, blocked = asyncio.Event(), asyncio.Event()

        arriving = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> Any:
            return arriving.pop() if arriving else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if len(sent) == 3:
                blocked.set()
                await reads.wait()
            sent.append(message.get("body", b"").decode())

        scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b""}
        scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http"}
        task = asyncio.create_task(create_app(service)(scope, receive, send))
        await blocked.wait()
        while service.worker.in_flight:
            await asyncio.sleep(0.01)
        reads.set()
        await task
        service.stop()

    asyncio.run(asyncio.wait_for(main(), 30))
    events = [event.removeprefix("data: ") for event in "".join(sent).split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    chunks = [json.loads(event) for event in events[:-2]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected.text
    # The head; role and first text; another text; the text whose sending was held up; all the rest, which is the last.
    assert len(sent) == 5
    # Role, these three texts, one that was fetched meanwhile, the rest, the finish reason.
    assert len(chunks) <= 7 < expected.forwards


class SmallBuffers(socket.socket):
    """A listening socket whose connections the kernel keeps little for."""

    def bind(self, address: Any) -> None:
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        super().bind(address)


async def dawdle(url: str, over: asyncio.Event) -> None:
    """Read 10 bytes a second of a long answer until it is over."""
    client = await RawClient.ask(url, long_body(max_tokens=48, stream=True, model=NAME), receive_buffer=BUFFER)
    assert await client.status() == 200
    while not over.is_set():
        await client.reader.read(1)
        await asyncio.sleep(0.1)
    client.leave()


async def median_time(url: str, count: int) -> float:
    times = []
    for _ in range(count):
        began = time.monotonic()
        client = await RawClient.ask(url, long_body(max_tokens=16, stream=True, model=NAME))
        assert "[DONE]" in await client.read_all()
        times.append(time.monotonic() - began)
        client.leave()
    return statistics.median(times)


def test_twenty_slow_readers_are_ended_and_nobody_else_notices(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "socket", types.SimpleNamespace(socket=SmallBuffers, IPPROTO_TCP=socket.IPPROTO_TCP))
    limit, slow = 5.0, 20
    # Long chunks: more than uvicorn and the kernel keep.
    settings = {"max_batch_size": 24, "slow_reader_timeout_s": limit, "served_model_name": NAME}
    with served(0.003, **settings) as (service, counted, url):

        async def main() -> None:
            usual = await median_time(url, 3)
            memory = psutil.Process().memory_info().rss
            over = asyncio.Event()
            dawdling = [asyncio.create_task(dawdle(url, over)) for _ in range(slow)]
            while counted["accepted"] < 3 + slow or service.llm.engine.active:
                await asyncio.sleep(0.01)
            # Their answers are complete: no slot waits for a reader.
            began = time.monotonic()
            assert await median_time(url, 3) < usual + 2  # a busy machine; far from the limit
            assert psutil.Process().memory_info().rss - memory < 30e6
            while counted["aborted"] < slow:
                await asyncio.sleep(0.01)
            assert time.monotonic() - began < limit + 2
            over.set()
            await asyncio.gather(*dawdling)

        asyncio.run(asyncio.wait_for(main(), 60))
        wait_until(lambda: nothing_left(service))
        wait_until(lambda: counted == {"accepted": slow + 6, "aborted": slow, "finished": 6})
