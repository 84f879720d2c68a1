"""What users see of a served model at every load, beside what its engine does without the server.

Rounds interleave (offline, served, offline, served): what slows a machine down for a while slows both down.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from d3llm_ray.benchmark.exchange import Answered, Exchange, Passage
from d3llm_ray.benchmark.files import begin, check, keep
from d3llm_ray.benchmark.report import BenchmarkReport
from d3llm_ray.benchmark.serving_client import ServingClient, serving_client
from d3llm_ray.benchmark.serving_load import Bounds, ClosedLoad, Load
from d3llm_ray.benchmark.serving_offline import OfflineEngine
from d3llm_ray.benchmark.serving_rows import COLUMNS, COUNTING, ServingRow, Slo, of_offline, same_tokens, serving_row
from d3llm_ray.benchmark.serving_settings import ServeBenchmarkSettings
from d3llm_ray.clients.connection import base_url
from d3llm_ray.errors import WorkError, one_line
from d3llm_ray.output_folder import sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.report import can_plot
from d3llm_ray.serving.server import serve_in_background
from d3llm_ray.serving.settings import ServeSettings
from d3llm_ray.trajectories.sources import open_source

ROUND_TRIPS = 20  # before each pass
BUSY_CLIENT = 0.8  # of a processor; beyond that the client is what is measured


@dataclass(frozen=True)
class Measured:
    """Passages by load, a round after the other; `floor`: the server's round trips before them, in seconds."""

    served: dict[str, list[Passage]] = field(default_factory=lambda: defaultdict(list))
    offline: dict[str, list[Passage]] = field(default_factory=lambda: defaultdict(list))
    floor: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


@sole_writer
def run(settings: ServeBenchmarkSettings, progress: Progress | None = None) -> BenchmarkReport[ServingRow]:
    """Measure every load, and write the report, with a plot beside it where matplotlib is installed.

    Raises:
        InputError: settings that do not go together, a key or prompts that cannot be read; before anything starts.
        WorkError: a server that does not start or is not there.
    """
    check(settings, settings.output)
    settings.check_loads()
    key = settings.api_key()
    source = open_source(settings.prompts, (), settings.split, max(settings.requests, settings.compared))
    prompts = [problem.messages for problem in source.problems()]
    progress = progress or Progress()
    begin(settings, settings.output)
    engine = OfflineEngine(settings.replica(), prompts) if settings.offline else None
    with _server(settings, progress) as url:
        bench = ServingBenchmark(settings, url, key, prompts, engine, progress)
        asyncio.run(bench.check_model())
        measured = bench.measure()
        lines = bench.check_tokens()
    expected = None if engine is None else {number: engine.answer(number) for number in range(len(prompts))}
    report = _report(settings, measured, expected, lines)
    if can_plot(plot := settings.output / "latency.png"):
        from d3llm_ray.benchmark.plots import plot_latency

        plot_latency(report, plot)
    return keep(report, settings, settings.output)


@contextmanager
def _server(settings: ServeBenchmarkSettings, progress: Progress) -> Iterator[str]:
    if settings.url is not None:
        yield base_url(settings.url)
        return
    served = ServeSettings(**{name: getattr(settings, name) for name in ServeSettings.model_fields})
    with serve_in_background(served, progress) as url:
        yield url


class ServingBenchmark:
    """The passes of one run against one server; all ask the same prompts, in turn."""

    def __init__(
        self,
        settings: ServeBenchmarkSettings,
        url: str,
        key: str | None,
        prompts: Sequence[Any],
        engine: OfflineEngine | None,
        progress: Progress,
    ) -> None:
        self._settings, self._url, self._key, self._prompts = settings, url, key, prompts
        self._engine, self._progress = engine, progress

    async def check_model(self) -> None:
        """Raise `InputError` unless the server has the model."""
        async with self._client() as client:
            await client.check_model(self._settings.model_id)

    def measure(self) -> Measured:
        """Every load in every round, the engine's turn right before the server's."""
        settings, measured = self._settings, Measured()
        turns = settings.rounds * settings.loads
        with self._progress.stage("benchmark", len(turns) * settings.requests, "request"):
            for turn, load in enumerate(turns):
                if self._engine is not None and isinstance(load, ClosedLoad):
                    at_once = min(load.clients, settings.max_batch_size)
                    measured.offline[load.name].append(self._engine.run(at_once, settings.bounds))
                measured.floor[load.name].append(asyncio.run(self._floor()))
                measured.served[load.name].append(asyncio.run(self._pass(load, turn * settings.requests)))
        return measured

    def check_tokens(self) -> list[str]:
        """Compare answers token by token, under the most clients; says how many are the offline engine's."""
        settings, engine = self._settings, self._engine
        if engine is None or not settings.compared:
            return []
        load = ClosedLoad(max(settings.concurrency, default=1))
        with self._progress.stage("check", settings.compared, "request"):
            passage = asyncio.run(self._events(load))
            engine.run(settings.max_batch_size, Bounds(settings.compared, float("inf")))  # what is new, as a batch
        same = sum(same_tokens(exchange, engine.answer(exchange.prompt)) for exchange in passage.exchanges)
        return [f"{same} of {len(passage.exchanges)} answers equal the offline ones token for token ({load.name})"]

    async def _floor(self) -> float:
        """The median round trip, in seconds, of requests that are answered at once, one after the other."""
        try:
            async with self._client() as client:
                await client.round_trip()  # makes the connection
                return float(np.median([await client.round_trip() for _ in range(ROUND_TRIPS)]))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise WorkError(f"{self._url}/health does not answer: {one_line(error)}") from error

    async def _pass(self, load: Load, done: int) -> Passage:
        """One load once, behind requests that make the connections and are not measured."""
        settings = self._settings
        async with self._client() as client:

            async def ask(number: int, since: float | None) -> Exchange:
                exchange = await self._ask(client, number, since)
                self._progress.update(done + number + 1, load=load.name, seconds=exchange.seconds)
                return exchange

            async def warm_up(number: int, since: float | None) -> Exchange:
                return await self._ask(client, number, since)

            clients = load.clients if isinstance(load, ClosedLoad) else 1
            await ClosedLoad(clients).run(warm_up, Bounds(settings.warm_up, settings.seconds))
            return await load.run(ask, settings.bounds)

    async def _events(self, load: ClosedLoad) -> Passage:
        async with self._client(stream=True) as client:

            async def ask(number: int, since: float | None) -> Exchange:
                exchange = await self._ask(client, number, since, events=True)
                self._progress.update(number + 1)
                return exchange

            return await load.run(ask, Bounds(self._settings.compared, float("inf")))

    async def _ask(self, client: ServingClient, number: int, since: float | None, *, events: bool = False) -> Exchange:
        prompt = number % len(self._prompts)
        return await client.ask(prompt, self._prompts[prompt], since, events=events)

    def _client(self, stream: bool | None = None) -> AbstractAsyncContextManager[ServingClient]:
        settings = self._settings
        fields = {"model": settings.model_id, "max_tokens": settings.max_tokens, "temperature": 0.0}
        stream = settings.stream if stream is None else stream
        return serving_client(self._url, self._key, fields, stream=stream, timeout_s=settings.timeout_s)


def _report(
    settings: ServeBenchmarkSettings,
    measured: Measured,
    expected: Mapping[int, Answered] | None,
    lines: Sequence[str],
) -> BenchmarkReport[ServingRow]:
    rows = tuple(_rows(settings, measured, expected))
    busy = [row.name for row in rows if row.client_cpu > BUSY_CLIENT]
    warning = [f"the client was the bottleneck at {', '.join(busy)}: these figures are its own"] if busy else []
    return BenchmarkReport(
        benchmark="serve",
        plan=settings.model_dump(mode="json"),
        rows=rows,
        ratios=tuple(of_offline(measured.served, measured.offline)),
        columns=COLUMNS,
        counting=COUNTING,
        lines=[*lines, *warning],
    )


def _rows(
    settings: ServeBenchmarkSettings, measured: Measured, expected: Mapping[int, Answered] | None
) -> Iterator[ServingRow]:
    slo = Slo(settings.slo_first_s, settings.slo_total_s)
    for load in settings.loads:
        offline = measured.offline.get(load.name, [])
        if offline and isinstance(load, ClosedLoad):
            at_once = min(load.clients, settings.max_batch_size)
            yield serving_row(f"offline, {at_once} at a time", "offline", at_once, offline, slo)
        kind = "closed" if isinstance(load, ClosedLoad) else "open"
        floor = measured.floor[load.name]
        yield serving_row(load.name, kind, load.size, measured.served[load.name], slo, expected, offline, floor)
