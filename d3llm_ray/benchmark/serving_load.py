"""Loads on a server: clients that each wait for their answer, or arrivals that wait for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import count
from random import Random
from time import perf_counter, process_time

from d3llm_ray.benchmark.exchange import Exchange, Passage

Ask = Callable[[int, float | None], Awaitable[Exchange]]  # number of the request, when it should have been sent


@dataclass(frozen=True)
class Bounds:
    """A pass ends with so many requests or, where that is earlier, begins none after so many seconds."""

    requests: int
    seconds: float


@dataclass(frozen=True)
class ClosedLoad:
    """`clients` that ask again as soon as they are answered: what a server can do."""

    clients: int

    @property
    def name(self) -> str:
        return f"{self.clients} client{'s' * (self.clients > 1)}"

    @property
    def size(self) -> float:
        return self.clients

    async def run(self, ask: Ask, bounds: Bounds) -> Passage:
        numbers, exchanges = iter(range(bounds.requests)), list[Exchange]()
        began, used = perf_counter(), process_time()

        async def client() -> None:
            for number in numbers:
                if perf_counter() - began >= bounds.seconds:
                    return
                exchanges.append(await ask(number, None))

        await asyncio.gather(*(client() for _ in range(self.clients)))
        return Passage(tuple(exchanges), perf_counter() - began, process_time() - used)


@dataclass(frozen=True)
class OpenLoad:
    """`rate` requests a second on average, at times of a Poisson process: what users do to a server.

    A request counts from when it was due, so that a client which falls behind does not flatter the server.
    """

    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.rate:g} requests/s"

    @property
    def size(self) -> float:
        return self.rate

    def arrivals(self, bounds: Bounds) -> Iterator[float]:
        """Seconds from the start, rising."""
        drawn, due = Random(self.seed), 0.0
        for _ in range(bounds.requests):
            due += drawn.expovariate(self.rate)
            if due >= bounds.seconds:
                return
            yield due

    async def run(self, ask: Ask, bounds: Bounds) -> Passage:
        began, used = perf_counter(), process_time()
        pending = []
        for number, due in zip(count(), self.arrivals(bounds), strict=False):
            await asyncio.sleep(max(began + due - perf_counter(), 0))
            pending.append(asyncio.ensure_future(ask(number, began + due)))
        exchanges = await asyncio.gather(*pending)
        return Passage(tuple(exchanges), perf_counter() - began, process_time() - used)


Load = ClosedLoad | OpenLoad
