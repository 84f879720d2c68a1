"""Several models behind one URL without Ray: each request comes to the replica whose model it names, whole."""

from __future__ import annotations

import asyncio
import json
import types
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from d3llm_ray import config
from d3llm_ray.errors import InputError
from d3llm_ray.serving import routed
from d3llm_ray.serving.app import application
from d3llm_ray.serving.exchange import exchange
from d3llm_ray.serving.front import Front
from d3llm_ray.serving.http import create_app
from d3llm_ray.serving.routed import deployment_name
from d3llm_ray.serving.router import Condition, Router, Served, ToReplica, create_router, portable
from d3llm_ray.serving.schemas import CHAT
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.settings import ApplicationSettings, ReplicaSettings
from tests.test_structure import reached_without_torch

QUESTION = [{"role": "user", "content": "2 + 3 ?"}]
LIMIT = 10_000


class Replica:
    """ASGI application that answers with what it was asked."""

    def __init__(self, name: str) -> None:
        self.name, self.paths = name, []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        query = scope["query_string"].decode()
        told = {"data": [{"id": self.name, "decoder": "d3llm"}]} if scope["path"].endswith("/models") else {}
        told |= {"replica": self.name, "method": scope["method"], "path": scope["path"], "query": query}
        status = 401 if b"bad" in dict(scope["headers"]).get(b"authorization", b"") else 200
        await send({"type": "http.response.start", "status": status, "headers": [(b"x-replica", self.name.encode())]})
        await send({"type": "http.response.body", "body": json.dumps(told | {"body": body.decode("latin-1")}).encode()})


class Fleet:
    """A router over replicas `a` and `b`, and how they are."""

    def __init__(self) -> None:
        self.replicas = {name: Replica(name) for name in ("a", "b")}
        self.conditions = {name: Condition(1, True) for name in self.replicas}
        deployments = {name: Served((name, f"{name}-tuned"), replica) for name, replica in self.replicas.items()}
        self.client = TestClient(create_router(Router(deployments, lambda: self.conditions), LIMIT))

    def set(self, **running: int) -> None:
        self.conditions |= {name: Condition(count, count > 0) for name, count in running.items()}


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.mark.parametrize("model", ["a", "b", "b-tuned"])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize", "/a/route/of/the/future"])
def test_a_request_goes_to_the_model_that_its_body_names_whole(fleet: Fleet, path: str, model: str) -> None:
    body = json.dumps({"model": model, "prompt": "x" * 3000})
    answer = fleet.client.post(f"{path}?q=1", content=body)
    told = answer.json()
    assert (told["replica"], told["path"], told["query"], told["body"]) == (model[0], path, "q=1", body)
    assert answer.headers["x-replica"] == model[0]


def test_a_query_names_a_model_as_well(fleet: Fleet) -> None:
    assert fleet.client.get("/docs?model=b").json()["replica"] == "b"


def test_an_unknown_model_is_404_with_the_list(fleet: Fleet) -> None:
    for answer in (fleet.client.post(CHAT, json={"model": "c"}), fleet.client.get("/docs?model=c")):
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert error["message"] == "model: 'c' is not served here; accepted: a, a-tuned, b, b-tuned"
        assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": 3}', b"[]", b"[" * 5000, b"\xff\xfe", b"{}"])
def test_what_names_no_model_goes_to_the_first_that_runs(fleet: Fleet, body: bytes) -> None:
    """Its replica says what is wrong with the body."""
    assert fleet.client.post(CHAT, content=body).headers["x-replica"] == "a"
    fleet.set(a=0)
    assert fleet.client.post(CHAT, content=body).headers["x-replica"] == "b"
    fleet.set(b=0)
    assert fleet.client.post(CHAT, content=body).headers["x-replica"] == "a"  # and is woken


def test_a_body_is_read_up_to_the_limit(fleet: Fleet) -> None:
    answer = fleet.client.post(CHAT, content=json.dumps({"model": "a", "x": "y" * LIMIT}))
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == f"body: too large; accepted: at most {LIMIT} bytes"
    assert not fleet.replicas["a"].paths


def test_all_models_are_listed_and_those_without_a_replica_are_not_woken(fleet: Fleet) -> None:
    def listed() -> list[str]:
        return [card["id"] for card in fleet.client.get("/v1/models").json()["data"]]

    fleet.set(a=0)
    assert listed() == ["a", "a-tuned", "b"]
    assert fleet.replicas["a"].paths == []
    fleet.set(a=1)
    assert listed() == ["a", "b"]  # as the replicas say
    fleet.set(a=0)
    assert fleet.client.get("/v1/models").json()["data"][0]["decoder"] == "d3llm"  # what it said last
    assert fleet.replicas["a"].paths == ["/v1/models"]
    assert fleet.client.get("/v1/models/b").json() == {"id": "b", "decoder": "d3llm"}
    missing = fleet.client.get("/v1/models/org/c")
    assert missing.status_code == 404
    assert missing.json()["error"]["message"] == "model: 'org/c' is not served here; accepted: a, b"


def test_a_replicas_refusal_of_the_list_is_the_answer(fleet: Fleet) -> None:
    for path in ("/v1/models", "/v1/models/a"):
        answer = fleet.client.get(path, headers={"Authorization": "bad"})
        assert (answer.status_code, answer.headers["x-replica"]) == (401, "a")


def test_health_and_readiness_are_the_routers_own(fleet: Fleet) -> None:
    assert fleet.client.get("/health").json() == {"status": "ok"}
    assert fleet.client.get("/ready").status_code == 200
    fleet.conditions["a"] = Condition(0, True)  # scaled to zero
    assert fleet.client.get("/ready").status_code == 200
    fleet.conditions["b"] = Condition(1, False)
    answer = fleet.client.get("/ready")
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "not ready: b")
    del fleet.conditions["a"]
    assert fleet.client.get("/ready").json()["error"]["message"] == "not ready: a, b"
    assert fleet.client.get("/health").status_code == 200
    assert not fleet.replicas["a"].paths and not fleet.replicas["b"].paths


@pytest.fixture
def behind(service: ChatService, client: TestClient) -> Iterator[TestClient]:
    """The session's model behind a router, as two processes would have it."""

    def call(scope: dict[str, Any], body: bytes) -> AsyncGenerator[Any, None]:
        return exchange(create_app(service), scope, body)

    router = Router({"m": Served(("tiny-random",), ToReplica(call))}, lambda: {"m": Condition(1, True)})
    app = create_router(router, 1_000_000)

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    with TestClient(asgi) as test_client:
        test_client.portal = client.portal  # the loop that the model's worker answers on
        yield test_client


def text_of(answer: Any) -> str:
    """Of a JSON answer or a stream."""
    if "json" in answer.headers["content-type"]:
        return str(answer.json()["choices"][0]["message"]["content"])
    events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


def test_answers_behind_the_router_are_those_of_the_replica(behind: TestClient, client: TestClient) -> None:
    for extra in ({}, {"stream": True}):
        body = {"model": "tiny-random", "messages": QUESTION, "max_tokens": 32, **extra}
        answer, direct = behind.post(CHAT, json=body), client.post(CHAT, json=body)
        assert answer.status_code == direct.status_code == 200
        assert answer.headers["content-type"] == direct.headers["content-type"]

        assert text_of(answer) == text_of(direct) != ""
    for path, payload in ((CHAT, {"model": "tiny-random", "n": 99}), (CHAT, {"model": "tiny-random"})):
        assert behind.post(path, json=payload).json() == client.post(path, json=payload).json()
    assert behind.get("/nowhere").json() == client.get("/nowhere").json()
    assert behind.get(CHAT).status_code == client.get(CHAT).status_code == 405
    assert behind.get("/v1/models").json() == client.get("/v1/models").json()


def scope_of(path: str = "/", **values: Any) -> dict[str, Any]:
    usual = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
    return usual | values


def test_a_client_that_leaves_is_news_to_the_route() -> None:
    ended: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def main() -> None:
        messages = exchange(app, scope_of(), b"")
        assert (await anext(messages))["status"] == 200
        await messages.aclose()
        assert ended == ["cancelled"]

    asyncio.run(main())


def test_a_stream_passes_the_router_as_it_grows() -> None:
    """Each part has come out before the replica sends the next one."""
    parts = [b"one", b"two", b"three"]
    came: asyncio.Queue[bytes] = asyncio.Queue()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            assert await came.get() == part
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps({"model": "m"}).encode()}

    async def send(message: Any) -> None:
        if message.get("body"):
            came.put_nowait(message["body"])

    served = Served(("m",), Front(ToReplica(lambda scope, body: exchange(app, scope, body)), lambda name: 1))
    router = create_router(Router({"m": served}, lambda: {}), LIMIT)
    asyncio.run(asyncio.wait_for(router(scope_of(CHAT, method="POST"), receive, send), 10))


def test_an_application_may_be_ahead_of_its_reader_by_a_few_messages_only() -> None:
    sent: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for number in range(1000):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            sent.append(number)

    async def main() -> None:
        messages = exchange(app, scope_of(), b"")
        await anext(messages)
        await asyncio.sleep(0.01)
        assert len(sent) < 20
        assert len([message async for message in messages]) == 999

    asyncio.run(main())


def test_a_replica_that_fails_is_503_before_the_answer_and_a_cut_after_its_beginning() -> None:
    async def failing(begun: bool) -> AsyncGenerator[Any, None]:
        if begun:
            yield {"type": "http.response.start", "status": 200, "headers": []}
        raise RuntimeError("the actor died")

    def client_of(begun: bool) -> TestClient:
        served = Served(("m",), ToReplica(lambda scope, body: failing(begun)))
        return TestClient(create_router(Router({"m": served}, lambda: {}), LIMIT), raise_server_exceptions=False)

    answer = client_of(False).post(CHAT, json={"model": "m"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "replica_failed"
    with pytest.raises(RuntimeError):
        TestClient(client_of(True).app).post(CHAT, json={"model": "m"})


def test_what_of_a_scope_travels_is_plain() -> None:
    scope = scope_of("/x", headers=[(b"a", bytearray(b"b"))], client=("127.0.0.1", 1), state={}, app=object())
    told = portable(scope)
    assert set(told) == {"type", "method", "path", "query_string", "headers", "client"}
    assert told["headers"] == [(b"a", b"b")]


def test_the_router_need_not_import_torch() -> None:
    assert {"serving.router", "serving.front"} <= reached_without_torch("serving.routed")


# --- settings


def test_settings_of_each_model_go_above_those_beside(tiny_checkpoint: Path) -> None:
    model = str(tiny_checkpoint)
    settings = config.build(
        ApplicationSettings,
        {"max_queue": 7, "max_batch_size": 3, "models": [{"model": model}, {"served_model_name": "b", "max_queue": 9}]},
    )
    first, second = settings.each()
    assert (first.model_id, first.max_queue, first.max_batch_size) == (tiny_checkpoint.name, 7, 3)
    assert (second.model, second.model_id, second.max_queue) == ("tiny-llada", "b", 9)
    assert ApplicationSettings(model=model).each() == [ReplicaSettings(model=model)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"models": [{}, {}]}, "models: got 'tiny-llada'; accepted: an id once (served_model_name, adapters)"),
        ({"models": [{"modle": "x"}]}, "models.0.modle: unknown setting"),
        ({"models": [{}], "model": "x"}, "model: got 'x'; accepted: nothing beside models"),
        ({"models": [{"served_model_name": "a/b"}, {"served_model_name": "a-b"}]}, "models: got ['a-b', 'a-b']"),
        ({"models": [{"served_model_name": "router"}]}, "models: got ['router']"),
        ({"models": [{"decoder": "d4llm"}]}, "decoder: unknown value 'd4llm'"),
    ],
)
def test_bad_models_stop_the_builder(args: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        application(config.build(ApplicationSettings, args))
    assert str(error.value).startswith(message)


def test_names_of_deployments() -> None:
    assert deployment_name("d3LLM/LLaDA#8B v1.0_x") == "d3LLM-LLaDA-8B-v1.0_x"


def test_the_router_asks_for_a_key_before_it_looks_at_a_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("key-1\n")
    file.chmod(0o600)
    monkeypatch.setattr(routed.serve, "get_replica_context", lambda: types.SimpleNamespace(app_name="app"))
    monkeypatch.setattr(routed, "conditions_of", lambda name: {"a": Condition(0, name == "app")})
    monkeypatch.setattr(routed.RouterReplica, "_way_to", lambda self, name: Replica(name))
    settings = ReplicaSettings(api_keys=file, max_body_bytes=LIMIT, log_requests=False)
    replica = routed.RouterReplica({"a": ("a",)}, {}, settings)
    client = TestClient(asyncio.run(replica.__serve_build_asgi_app__()))
    for ask in (lambda **h: client.get("/v1/models", **h), lambda **h: client.post(CHAT, json={"model": "c"}, **h)):
        assert ask().status_code == 401
        assert ask(headers={"Authorization": "Bearer key-2"}).status_code == 401
    key = {"Authorization": "Bearer key-1"}
    assert client.get("/v1/models", headers=key).json()["data"][0]["id"] == "a"
    assert client.post(CHAT, json={"model": "c"}, headers=key).status_code == 404
    assert client.post(CHAT, json={"model": "a", "x": "y" * LIMIT}, headers=key).status_code == 413
    assert client.get("/health").status_code == client.get("/ready").status_code == 200


def test_the_router_lets_the_front_of_serves_proxy_know_that_it_is_ours(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that there, too, a server that drains is alive and not ready, and slow readers are ended."""
    monkeypatch.setattr(routed.serve, "get_replica_context", lambda: types.SimpleNamespace(app_name="app"))
    models = [
        {"model": str(tiny_checkpoint), "served_model_name": name, "slow_reader_timeout_s": limit}
        for name, limit in (("a", 7.0), ("b", 9.0))
    ]
    bound = application(config.build(ApplicationSettings, {"models": models}))._bound_deployment
    ids, _, guarded = bound.init_args
    monkeypatch.setattr(routed.RouterReplica, "_way_to", lambda self, name: Replica(name))
    app = asyncio.run(routed.RouterReplica(ids, {}, guarded).__serve_build_asgi_app__())
    front = Front(app, lambda name: 1)
    assert TestClient(front).get("/health").headers.get("x-d3llm-room") is None
    (room,) = front._rooms.values()
    assert (room.limited, room.slow_reader_s) == (False, 9.0)
