"""A replica under a hundred clients for minutes: its memory is flat, its answers stay as fast, nothing is lost.

    make soak                      10 minutes
    SOAK_SECONDS=60 make soak      as long as that; of fewer than 300 s the figures are noisy

`SOAK_DRIFT` is how much the 99th percentile may grow (0.1): on a machine that does other work, set it higher.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest

from d3llm_ray.serving.schemas import CHAT
from d3llm_ray.serving.server import serve_in_background
from d3llm_ray.serving.settings import ServeSettings
from d3llm_ray.tasks import load_task

pytestmark = pytest.mark.soak
SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
DRIFT = float(os.environ.get("SOAK_DRIFT", "0.1"))
CLIENTS = 100
MOST_MIB_A_MINUTE = 1.0
WARM_UP = 0.25  # of the time: caches fill, the allocator takes what it needs
ROOM = 16 + 64


@pytest.fixture(scope="module")
def url(ray_cluster: None) -> Iterator[str]:
    with serve_in_background(ServeSettings(model="tiny-llada", port=0)) as url:
        yield url


def replica() -> psutil.Process:
    (process,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "ray::ServeReplica" in " ".join(process.info["cmdline"] or ())
    ]
    return process


class Users:
    """Clients with a seeded mix: half want JSON, others a stream, of which some are left."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, f"{url}{CHAT}"
        self._problems = load_task("arith").problems("test", 200)
        self.answered: list[tuple[float, float]] = []  # (when, seconds)
        self.cancelled = self.refused = 0
        self.errors: list[str] = []

    async def run(self, number: int, until: float) -> None:
        drawn = random.Random(number)
        while time.monotonic() < until:
            try:
                await self.ask(drawn)
            except (aiohttp.ClientError, TimeoutError) as error:
                self.errors.append(repr(error))

    async def ask(self, drawn: random.Random) -> None:
        stream, leaves = drawn.random() < 0.5, drawn.random() < 0.2
        body = {"model": "tiny-llada", "messages": drawn.choice(self._problems).messages, "stream": stream}
        began = time.monotonic()
        async with self._session.post(self._url, json=body) as response:
            if response.status == 429:
                self.refused += 1
                await asyncio.sleep(float(response.headers["retry-after"]) * drawn.uniform(0.5, 1.5))
                return
            if stream and leaves:
                await response.content.readany()
                self.cancelled += 1
                return  # the connection is closed with the answer unread
            text = await response.text()
        if response.status != 200 or (stream and not text.endswith("data: [DONE]\n\n")):
            self.errors.append(f"{response.status}: {text[-200:]}")
        else:
            self.answered.append((began, time.monotonic() - began))


async def watch(process: psutil.Process, until: float) -> list[tuple[float, float]]:
    """(seconds, MiB) every second."""
    found = []
    while time.monotonic() < until:
        found.append((time.monotonic(), process.memory_info().rss / 2**20))
        await asyncio.sleep(1)
    return found


async def soak(url: str) -> tuple[Users, list[tuple[float, float]], list[int]]:
    """The users with what they saw, the replica's memory, and the answers to as many requests as there is room for."""
    until = time.monotonic() + SECONDS
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        users = Users(session, url)
        memory, *_ = await asyncio.gather(
            watch(replica(), until), *(users.run(number, until) for number in range(CLIENTS))
        )
        await asyncio.sleep(2)  # those that left have left
        body: Any = {"model": "tiny-llada", "messages": [{"role": "user", "content": "2 + 3 ?"}]}

        async def status() -> int:
            async with session.post(f"{url}{CHAT}", json=body) as response:
                await response.read()
                return response.status

        last = await asyncio.gather(*(status() for _ in range(ROOM)))
    return users, memory, list(last)


@pytest.mark.timeout(SECONDS + 300)
def test_memory_and_latency_stay_as_they_are(url: str) -> None:
    began = time.monotonic()
    users, memory, last = asyncio.run(soak(url))
    warm = began + WARM_UP * SECONDS
    steady = [(moment, mib) for moment, mib in memory if moment >= warm]
    slope = 60 * float(np.polyfit(*zip(*steady, strict=True), 1)[0])
    half = (warm + began + SECONDS) / 2
    early = [seconds for moment, seconds in users.answered if warm <= moment < half]
    late = [seconds for moment, seconds in users.answered if moment >= half]
    before, after = (float(np.quantile(seconds, 0.99)) for seconds in (early, late))
    figures = {
        "seconds": SECONDS, "answered": len(users.answered), "cancelled": users.cancelled, "refused": users.refused,
        "errors": len(users.errors), "rss_mib": [steady[0][1], steady[-1][1]], "mib_a_minute": slope,
        "p99_s": [before, after], "p50_s": [float(np.median(seconds)) for seconds in (early, late)],
        "load_average": os.getloadavg()[0],
    }  # fmt: skip
    print(json.dumps(figures))
    assert users.errors == []
    assert last == [200] * ROOM  # no place is still taken
    assert slope < MOST_MIB_A_MINUTE
    assert after < (1 + DRIFT) * before
