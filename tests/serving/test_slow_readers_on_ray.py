"""Twenty clients that read ten bytes a second, through Serve's proxy: what the others notice of them.

    pytest -s -m soak tests/serving/test_slow_readers_on_ray.py

Times with and without the twenty alternate, as a machine's other work comes and goes, and the medians over the times
are compared. `SLOW_READERS_TIMES` is how many there are of each (10), `SLOW_READERS_CHANGE` how much the others' 99th
percentile may grow (0.1).
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import numpy as np
import pytest

from d3llm_ray.serving.schemas import CHAT
from d3llm_ray.serving.server import serve_in_background
from d3llm_ray.serving.settings import ServeSettings
from tests.serving.life import long_body
from tests.serving.raw_client import RawClient

CHANGE = float(os.environ.get("SLOW_READERS_CHANGE", "0.1"))
ALTERNATIONS, SECONDS = int(os.environ.get("SLOW_READERS_TIMES", "10")), 8.0
SLOW, OTHERS = 20, 4
BYTES_A_SECOND = 10
RECEIVES = 4096  # bytes that the kernel keeps for a slow one, about

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def url(ray_cluster: None) -> Iterator[str]:
    # Nobody is ended for reading slowly while this runs.
    settings = ServeSettings(model="tiny-llada", port=0, max_batch_size=SLOW + OTHERS, slow_reader_timeout_s=600.0)
    with serve_in_background(settings) as url:
        yield url


def long_stream() -> dict[str, Any]:
    """Several hundred kilobytes of events."""
    return long_body(max_tokens=192, stream=True, model="tiny-llada", logprobs=True, top_logprobs=20)


async def dawdle(client: RawClient) -> None:
    """Read on, slowly, until cancelled."""
    while True:
        await client.reader.read(1)
        await asyncio.sleep(1 / BYTES_A_SECOND)


async def others(session: aiohttp.ClientSession, url: str) -> list[float]:
    """Seconds that each answer took for clients that ask without a pause."""
    until, taken = time.monotonic() + SECONDS, list[float]()
    body = {"model": "tiny-llada", "messages": [{"role": "user", "content": "2 + 3 ?"}], "max_tokens": 16}

    async def one() -> None:
        while (began := time.monotonic()) < until:
            async with session.post(url + CHAT, json=body) as response:
                assert response.status == 200
                await response.read()
            taken.append(time.monotonic() - began)

    await asyncio.gather(*(one() for _ in range(OTHERS)))
    return taken


async def alternate(url: str) -> tuple[list[list[float]], list[list[float]], int]:
    """What others saw in each time without and with slow readers, and the bytes of one of their answers."""
    without, beside, size = list[list[float]](), list[list[float]](), 0
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        await others(session, url)  # warm-up
        for _ in range(ALTERNATIONS):
            without.append(await others(session, url))
            clients = [await RawClient.ask(url, long_stream(), receive_buffer=RECEIVES) for _ in range(SLOW)]
            for client in clients:
                assert await client.status() == 200
            dawdling = [asyncio.create_task(dawdle(client)) for client in clients]
            quick = await RawClient.ask(url, long_stream())
            size = len(await quick.read_all())  # by then the others' answers are decoded too
            quick.leave()
            beside.append(await others(session, url))
            assert not any(task.done() for task in dawdling)
            for task, client in zip(dawdling, clients, strict=True):
                task.cancel()
                client.leave()
            await asyncio.sleep(0.5)
    return without, beside, size


def test_twenty_slow_readers_change_little_for_others(url: str) -> None:
    without, beside, size = asyncio.run(alternate(url))
    figures: dict[str, Any] = {
        "answers": [sum(map(len, times)) for times in (without, beside)],
        "bytes_of_a_slow_answer": size,
        "load_average": os.getloadavg()[0],
    }
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        before, after = ([float(np.quantile(taken, share)) for taken in times] for times in (without, beside))
        figures[f"{name}_s"] = [statistics.median(before), statistics.median(after)]
        figures[f"{name}_ratio"] = statistics.median(after) / statistics.median(before)
        figures[f"{name}_ratios"] = sorted(round(b / a, 3) for a, b in zip(before, after, strict=True))
    print(json.dumps(figures), flush=True)
    assert figures["p99_ratio"] < 1 + CHANGE
