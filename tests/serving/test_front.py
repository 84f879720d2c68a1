"""The front of Serve's proxy without Ray: what it lets by, what it refuses, and what it knows of the replicas."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from d3llm_ray.serving import front
from d3llm_ray.serving.front import PROXY_OPTIONS, Front, TellsRoom
from d3llm_ray.serving.schemas import CHAT, COMPLETIONS, HEALTH, READY
from tests.test_structure import reached_without_torch

ROOT = Path(__file__).parents[2]


class Proxy:
    """Serve's proxy and one replica behind it: health at once, chats when the test lets them end."""

    def __init__(self, room: int | None = 2, count_replicas: Callable[[str], int] = lambda name: 1) -> None:
        self.room, self.chats, self.order = room, 0, []
        self.end, self.cut, self.linger, self.answered = (asyncio.Event() for _ in range(4))
        self.cut.set()
        self.linger.set()
        self.front = Front(self.answer, count_replicas)

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        if self.room != 0:
            await TellsRoom(self.replica, "app", "m", self.room, 30.0)(scope, receive, send)
        else:
            await self.replica(scope, receive, send)

    async def replica(self, scope: Any, receive: Any, send: Any) -> None:
        status = (
            200
            if scope["path"].startswith(("/v1", "/a/v1", "/b/v1")) or scope["path"].endswith((HEALTH, READY))
            else 404
        )
        if scope["path"].endswith(CHAT) and scope["method"] == "POST":
            self.chats += 1
            self.order.append(200)
            await self.end.wait()
        await send({"type": "http.response.start", "status": status, "headers": [(b"x-other", b"1")]})
        await send({"type": "http.response.body", "body": b"{", "more_body": True})
        if scope["path"].endswith(CHAT):
            await self.cut.wait()
        await send({"type": "http.response.body", "body": b"}"})
        self.answered.set()
        await self.linger.wait()  # Serve has something to do yet

    async def ask(self, path: str = CHAT, method: str = "POST", **headers: str) -> tuple[int, dict[str, str], bytes]:
        messages: list[Any] = []

        async def send(message: Any) -> None:
            messages.append(message)
            if message.get("status") == 429:
                self.order.append(429)

        async def receive() -> Any:
            raise AssertionError("the front reads no body")

        sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        await self.front({"type": "http", "method": method, "path": path, "headers": sent}, receive, send)
        start, *rest = messages
        told = {name.decode(): value.decode() for name, value in start["headers"]}
        return start["status"], told, b"".join(message["body"] for message in rest)

    async def health(self, prefix: str = "") -> int:
        return (await self.ask(prefix + HEALTH, "GET"))[0]

    async def begin(self, count: int, path: str = CHAT) -> list[asyncio.Task[Any]]:
        """Send chats and wait until each has come to the replica or been refused."""
        before = len(self.order)
        tasks = [asyncio.create_task(self.ask(path)) for _ in range(count)]
        while len(self.order) < before + count:
            await asyncio.sleep(0.001)
        return tasks

    async def statuses(self, tasks: list[asyncio.Task[Any]]) -> dict[int, int]:
        self.end.set()
        return dict(Counter(status for status, *_ in await asyncio.gather(*tasks)))


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(), 20)

    asyncio.run(main())


def test_what_there_is_room_for_is_handed_on_and_the_rest_refused_as_openai_would() -> None:
    async def test() -> None:
        proxy = Proxy(room=2)
        assert await proxy.health() == 200
        tasks = await proxy.begin(2)
        status, headers, body = await proxy.ask(x_request_id="mine")
        assert (status, headers["retry-after"], headers["x-request-id"]) == (429, "1", "mine")
        assert headers["content-type"] == "application/json"
        assert int(headers["content-length"]) == len(body)
        error = {"message": "the queue is full; ask again later", "type": "rate_limit_error"}
        assert json.loads(body) == {"error": {**error, "param": None, "code": "queue_full"}}
        assert (await proxy.ask())[1]["x-request-id"]
        assert proxy.chats == 2
        assert await proxy.statuses(tasks) == {200: 2}

    run(test)


def test_chats_and_completions_share_the_room() -> None:
    async def test() -> None:
        proxy = Proxy(room=1)
        await proxy.health()
        tasks = await proxy.begin(1)
        assert (await proxy.ask(COMPLETIONS))[0] == 429
        assert await proxy.statuses(tasks) == {200: 1}
        assert (await proxy.ask(COMPLETIONS))[0] == 200

    run(test)


def test_health_and_other_routes_pass_when_all_is_full() -> None:
    async def test() -> None:
        proxy = Proxy(room=1)
        await proxy.health()
        tasks = await proxy.begin(1)
        assert await proxy.health() == 200
        for path, method in (("/v1/models", "GET"), (CHAT, "GET")):
            status, headers, _ = await proxy.ask(path, method)
            assert (status, headers) == (200, {"x-other": "1"})  # and nobody sees what replicas tell the front
        assert (await proxy.ask())[0] == 429
        await proxy.statuses(tasks)

    run(test)


def test_until_a_replica_has_told_its_room_and_for_other_applications_nothing_is_refused() -> None:
    async def test() -> None:
        for room in (1, 0):
            proxy = Proxy(room=room)
            if room == 0:
                await proxy.health()
            assert await proxy.statuses(await proxy.begin(5)) == {200: 5}

    run(test)


def test_a_chat_answer_tells_the_room_as_well_and_another_deployment_another_room() -> None:
    async def test() -> None:
        proxy = Proxy(room=1)
        await proxy.statuses(await proxy.begin(1))
        proxy.end.clear()
        assert await proxy.statuses(await proxy.begin(3)) == {200: 1, 429: 2}
        proxy.end.clear()
        proxy.room = 2
        await proxy.health()
        assert await proxy.statuses(await proxy.begin(3)) == {200: 2, 429: 1}

    run(test)


def test_a_path_without_an_application_teaches_nothing() -> None:
    async def test() -> None:
        proxy = Proxy(room=1)
        proxy.end.set()
        await asyncio.gather(*(proxy.ask(f"/nowhere{n}{CHAT}") for n in range(5)))
        assert not proxy.front._rooms

    run(test)


def test_applications_have_rooms_of_their_own() -> None:
    async def test() -> None:
        proxy = Proxy(room=1)
        await proxy.health("/a")
        await proxy.health("/b")
        tasks = await proxy.begin(2, f"/a{CHAT}") + await proxy.begin(1, f"/b{CHAT}")
        assert await proxy.statuses(tasks) == {200: 2, 429: 1}

    run(test)


def test_a_client_that_leaves_and_a_failure_make_room() -> None:
    """Serve fails where a replica dies: its client may ask again."""

    async def test() -> None:
        proxy = Proxy(room=1)
        await proxy.health()
        (leaving,) = await proxy.begin(1)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)

        async def failing(*_: Any) -> None:
            raise RuntimeError

        app, proxy.front._app = proxy.front._app, failing
        assert (await proxy.ask())[0] == 503
        proxy.front._app = app
        assert await proxy.statuses(await proxy.begin(1)) == {200: 1}

    run(test)


def test_a_place_is_free_with_the_last_byte_of_an_answer_and_not_before() -> None:
    async def test() -> None:
        proxy = Proxy(room=1)
        await proxy.health()
        proxy.end.set()
        proxy.cut.clear()
        proxy.linger.clear()
        proxy.answered.clear()
        (streaming,) = await proxy.begin(1)
        assert (await proxy.ask())[0] == 429
        proxy.cut.set()
        await proxy.answered.wait()
        assert not streaming.done()
        tasks = await proxy.begin(1)
        proxy.linger.set()
        assert await proxy.statuses([streaming, *tasks]) == {200: 2}

    run(test)


def test_room_grows_with_the_replicas_which_are_counted_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas, asked = [1], []

    def count(name: str) -> int:
        assert threading.current_thread() is not threading.main_thread()
        asked.append(name)
        if replicas[0] < 0:
            raise RuntimeError("no controller")
        return replicas[0]

    async def test() -> None:
        proxy = Proxy(room=1, count_replicas=count)

        async def accepted() -> int:
            await asyncio.sleep(0.05)  # a count that is under way ends
            await proxy.health()
            await asyncio.sleep(0.05)
            proxy.end.clear()
            return (await proxy.statuses(await proxy.begin(5)))[200]

        assert await accepted() == 1
        replicas[0] = 3
        assert await accepted() == 1
        assert asked == ["app"]  # not again so soon
        monkeypatch.setattr(front, "RECOUNT_S", 0.0)
        assert await accepted() == 3
        replicas[0] = -1
        assert await accepted() == 3
        replicas[0] = 0  # all of them are being replaced
        assert await accepted() == 1

    run(test)


def test_refusals_of_a_shower_come_before_the_work_of_handing_on() -> None:
    async def test() -> None:
        proxy = Proxy(room=10)
        await proxy.health()
        tasks = await proxy.begin(200)
        assert proxy.order == [200] + [429] * 190 + [200] * 9  # the first one was alone
        assert await proxy.statuses(tasks) == {200: 10, 429: 190}

    run(test)


def test_refusals_are_counted_for_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[tuple[str, str]] = []

    class Metrics:
        def __init__(self, *tags: str) -> None:
            self._tags = tags

        def refused(self) -> None:
            refused.append(self._tags)

    monkeypatch.setattr(front, "ServingMetrics", Metrics)

    async def test() -> None:
        proxy = Proxy(room=1)
        await proxy.health()
        await proxy.statuses(await proxy.begin(4))
        assert refused == [("m", "app")] * 3

    run(test)


@pytest.mark.parametrize("name", ["tiny", "llada-8b", "dream-7b", "multi-model"])
def test_serve_is_told_of_the_front(name: str) -> None:
    content = yaml.safe_load((ROOT / "serve_configs" / f"{name}.yaml").read_text())
    options = ServeDeploySchema(**content).controller_options
    assert options is not None
    assert options.runtime_env == PROXY_OPTIONS["runtime_env"]
    module, _, attribute = next(iter(PROXY_OPTIONS["runtime_env"]["env_vars"].values())).partition(":")
    (middleware,) = getattr(import_module(module), attribute)()
    assert middleware.cls is Front


def test_the_proxy_need_not_import_torch() -> None:
    assert "metrics" in reached_without_torch("serving.front")


async def not_found(scope: Any, receive: Any, send: Any) -> None:
    """Serve's proxy, for an application that it has taken down."""
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b"Path '/' not found."})


@pytest.mark.parametrize("room", [5, None])
def test_while_answers_are_finished_a_model_that_was_taken_down_is_a_503_and_then_unknown(room: int | None) -> None:
    async def test() -> None:
        proxy = Proxy(room=room)
        await proxy.health()
        tasks = await proxy.begin(1)
        serves, proxy.front._app = proxy.front._app, not_found
        status, headers, body = await proxy.ask()
        assert (status, headers["retry-after"], json.loads(body)["error"]["code"]) == (503, "1", "draining")
        assert await proxy.statuses(tasks) == {200: 1}
        assert (await proxy.ask())[0] == 404
        proxy.front._app = serves
        assert (await proxy.ask())[0] == 200

    run(test)


@pytest.mark.parametrize("room", [5, None])
def test_a_server_that_drains_is_alive_and_not_ready(room: int | None) -> None:
    """What an orchestrator would end at once would not finish its answers; what it calls ready would get new ones."""

    async def test() -> None:
        proxy = Proxy(room=room)
        assert (await proxy.ask(READY, "GET"))[0] == await proxy.health() == 200
        tasks = await proxy.begin(1)
        assert (await proxy.ask(READY, "GET"))[0] == await proxy.health() == 200
        proxy.front._app = not_found
        status, headers, body = await proxy.ask(READY, "GET", x_request_id="mine")
        assert (status, headers["retry-after"], headers["x-request-id"]) == (503, "1", "mine")
        error = {"message": "the server is stopping; ask again later", "type": "service_unavailable"}
        assert json.loads(body) == {"error": {**error, "param": None, "code": "draining"}}
        status, headers, body = await proxy.ask(HEALTH, "GET")
        assert (status, headers["content-type"], json.loads(body)) == (200, "application/json", {"status": "ok"})
        assert (await proxy.ask("/elsewhere" + READY, "GET"))[0] == 404
        assert await proxy.statuses(tasks) == {200: 1}
        assert (await proxy.ask(READY, "GET"))[0] == await proxy.health() == 404

    run(test)


def test_a_probe_whose_replica_has_died_is_told_so_as_any_request() -> None:
    async def dies(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("the actor is dead")

    async def test() -> None:
        proxy = Proxy()
        await proxy.health()
        proxy.front._app = dies
        for route in (HEALTH, READY):
            status, _, body = await proxy.ask(route, "GET")
            assert (status, json.loads(body)["error"]["code"]) == (503, "replica_lost")

    run(test)


def test_behind_a_router_nothing_is_refused_or_held_up_here() -> None:
    counted: list[str] = []

    def count(name: str) -> int:
        counted.append(name)
        return 1

    async def test() -> None:
        proxy = Proxy(room=None, count_replicas=count)
        await proxy.health()
        tasks = await proxy.begin(200)
        assert proxy.order == [200] * 200
        assert await proxy.statuses(tasks) == {200: 200}
        assert counted == []

    run(test)
