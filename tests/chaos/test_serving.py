"""A server under attack: replicas killed under load, and a server that is stopped while it answers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.serving import server
from d3llm_ray.serving.app import HEALTH_CHECK_PERIOD_S
from d3llm_ray.serving.front import running_replicas
from d3llm_ray.serving.schemas import CHAT, HEALTH, READY
from d3llm_ray.serving.server import APPLICATION, serve_in_background
from d3llm_ray.serving.settings import ServeSettings
from tests.chaos.cluster import free_port
from tests.chaos.faulty import faulty
from tests.serving.life import long_body
from tests.serving.raw_client import RawClient

pytestmark = pytest.mark.chaos
ROOT = Path(__file__).parents[2]
STREAMS, STREAMED_TOKENS = 64, 96
PROMPTS = [f"{count} + {count} ?" for count in range(20)]
TOKENS = 32
IN_HAND, STEP_TIMEOUT_S = 16, 2.0


def replicas() -> list[psutil.Process]:
    """The processes of the replicas that this process's cluster runs."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any("ServeReplica:d3llm:" in word for word in process.cmdline()):
                found.append(process)
    return found


class Load:
    """Clients that ask without a pause. What each hears is counted, and every answer compared with the offline one."""

    def __init__(self, url: str, expected: dict[str, str]) -> None:
        self._url, self._expected = url, expected
        self.answered, self.failed, self.wrong = 0, 0, 0
        self.last_answer = time.monotonic()

    async def ask(self, client: httpx.AsyncClient, content: str) -> None:
        body = {"model": "tiny-random", "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
        try:
            response = await client.post(self._url + CHAT, json=body)
        except httpx.HTTPError:
            self.failed += 1
            return
        if response.status_code == 429:
            await asyncio.sleep(0.2)
        elif response.status_code != 200:
            assert set(response.json()) == {"error"}, response.text
            self.failed += 1
        else:
            self.answered += 1
            self.last_answer = time.monotonic()
            self.wrong += response.json()["choices"][0]["message"]["content"] != self._expected[content]

    async def run(self, clients: int, over: asyncio.Event) -> None:
        async def one(client: httpx.AsyncClient, first: int) -> None:
            turn = first
            while not over.is_set():
                await self.ask(client, PROMPTS[turn % len(PROMPTS)])
                turn += 1

        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=clients)) as client:
            await asyncio.gather(*(one(client, number) for number in range(clients)))


# The only replica's successor must start first, beside the clients on the same cores: 8.5 s on two quiet ones.
@pytest.mark.parametrize(("count", "clients", "kills", "back_s"), [(2, 50, 5, 10), (1, 20, 2, 30)])
def test_a_killed_replica_costs_what_it_had_in_hand(
    ray_cluster: None, tiny_checkpoint: Path, count: int, clients: int, kills: int, back_s: float
) -> None:
    outputs = DiffusionLLM.from_pretrained(tiny_checkpoint).generate(PROMPTS, max_tokens=TOKENS)
    expected = dict(zip(PROMPTS, (output.text for output in outputs), strict=True))
    settings = ServeSettings(
        model=str(tiny_checkpoint), port=0, replicas=count, max_batch_size=16, max_queue=16, max_tokens=TOKENS
    )
    with serve_in_background(settings) as url:
        load = Load(url, expected)
        running: asyncio.Task[None]

        async def until(condition: Any, limit_s: float) -> float:
            began = time.monotonic()
            while not condition():
                if running.done():
                    running.result()  # what stopped the clients
                assert time.monotonic() - began < limit_s
                await asyncio.sleep(0.05)
            return time.monotonic() - began

        async def main() -> None:
            nonlocal running
            over = asyncio.Event()
            running = asyncio.create_task(load.run(clients, over))
            for number in range(kills):
                # Serve has noticed the last one's death, and its successor takes requests.
                await until(lambda: len(replicas()) == count == running_replicas(APPLICATION), 60)
                answered = load.answered
                await until(lambda seen=answered: load.answered > seen + clients, 60)
                failed, killed = load.failed, time.monotonic()
                replicas()[number % count].kill()
                await asyncio.sleep(0.5)  # answers that were on their way
                back = 0.5 + await until(lambda moment=killed: load.last_answer > moment + 0.5, 60)
                print(f"{count} replicas, kill {number + 1}: {load.failed - failed} failed, answers after {back:.1f} s")
                assert load.failed - failed <= settings.replica().room
                assert back < back_s
                await asyncio.sleep(2 * HEALTH_CHECK_PERIOD_S)
            over.set()
            await running

        asyncio.run(asyncio.wait_for(main(), 240))
    assert load.wrong == 0 < load.answered


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_a_broken_engine_is_told_at_once_and_its_replica_replaced(
    ray_cluster: None, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    (expected,) = DiffusionLLM.from_pretrained(tiny_checkpoint).generate(["2 + 3 ?"], max_tokens=TOKENS)
    settings = ServeSettings(model=str(tiny_checkpoint), port=0, max_batch_size=8, step_timeout_s=STEP_TIMEOUT_S)
    monkeypatch.setattr(server, "application", lambda told, **_: faulty(told, tmp_path))
    limit_s = 1.0 + (STEP_TIMEOUT_S if fault == "hangs" else 0.0)

    async def asked(client: httpx.AsyncClient, url: str, stream: bool) -> tuple[float, int, str]:
        """When an answer ended, its status, and all of it."""
        response = await client.post(url + CHAT, json=long_body(max_tokens=192, stream=stream))
        return time.time(), response.status_code, response.text

    async def main(url: str) -> None:
        (first,) = replicas()
        limits = httpx.Limits(max_connections=2 * IN_HAND)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            tasks = [asyncio.create_task(asked(client, url, stream)) for stream in (False, True) * (IN_HAND // 2)]
            await asyncio.sleep(2.0)  # half of them decode, the others wait
            assert not any(task.done() for task in tasks)
            (tmp_path / fault).touch()
            ill = 0.0
            while not all(task.done() for task in tasks):
                health = await client.get(url + HEALTH)
                ill = ill or (time.time() if health.status_code == 503 else 0.0)
                await asyncio.sleep(0.01)
            while not ill:
                ill = time.time() if (await client.get(url + HEALTH)).status_code == 503 else 0.0
            happened = float((tmp_path / "happened").read_text())
            ends = [task.result() for task in tasks]
            begun = [text for _, status, text in ends if status == 200]
            assert {status for _, status, _ in ends} <= {200, 500}  # the former: a stream that had begun
            assert len(begun) <= IN_HAND // 2
            assert all('"code":"engine_failed"' in text.replace(" ", "") for *_, text in ends)
            assert not any("[DONE]" in text or "secret" in text for *_, text in ends)
            body = {"model": "tiny-random", "messages": [{"role": "user", "content": "2 + 3 ?"}], "max_tokens": TOKENS}
            while (answer := await client.post(url + CHAT, json=body)).status_code != 200:
                assert time.time() < happened + 60
                await asyncio.sleep(0.1)
            back = time.time() - happened
            assert answer.json()["choices"][0]["message"]["content"] == expected.text
            assert (await client.get(url + READY)).status_code == 200
        told = max(end for end, *_ in ends) - happened
        print(f"{fault}: {IN_HAND} told after {told:.2f} s, health 503 after {ill - happened:.2f} s, back {back:.1f} s")
        assert max(told, ill - happened) < limit_s
        assert first.pid not in {process.pid for process in replicas()}

    with serve_in_background(settings) as url:
        asyncio.run(asyncio.wait_for(main(url), 120))


def test_a_server_that_is_stopped_finishes_what_it_has_begun(tiny_checkpoint: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = [
        "--model",
        str(tiny_checkpoint),
        "--port",
        str(port),
        "--max-batch-size",
        str(STREAMS),
        "--max-tokens-limit",
        str(STREAMED_TOKENS),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.serve", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def refused() -> tuple[int, str]:
        try:
            response = httpx.post(url + CHAT, json=long_body(), timeout=3)
        except httpx.TimeoutException:
            return 200, ""  # it was taken, and waits behind the streams
        return response.status_code, response.headers.get("retry-after", "")

    def probed() -> tuple[int, int]:
        return httpx.get(url + HEALTH, timeout=10).status_code, httpx.get(url + READY, timeout=10).status_code

    async def main() -> tuple[list[str], tuple[int, str], tuple[int, int]]:
        body = long_body(max_tokens=STREAMED_TOKENS, stream=True)
        clients = [await RawClient.ask(url, body) for _ in range(STREAMS)]
        for client in clients:
            await client.reader.readuntil(b'"forward"')
        process.send_signal(signal.SIGTERM)
        answers = [asyncio.ensure_future(client.read_all()) for client in clients]
        late = (200, "")
        while late[0] == 200 and not all(answer.done() for answer in answers):
            late = await asyncio.to_thread(refused)
        probes = await asyncio.to_thread(probed)
        return await asyncio.gather(*answers), late, probes

    try:
        wait_healthy(url, process)
        answers, late, probes = asyncio.run(asyncio.wait_for(main(), 120))
        assert sum("data: [DONE]" in answer for answer in answers) == STREAMS
        assert late == (503, "1")
        assert probes == (200, 503)  # alive, and not ready
        assert process.stderr is not None
        assert process.wait(75) == 0, process.stderr.read()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_healthy(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while True:
        with suppress(OSError), urllib.request.urlopen(url + HEALTH, timeout=5) as response:
            assert json.load(response)["status"] == "ok"
            return
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
