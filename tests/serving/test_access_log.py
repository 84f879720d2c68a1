"""The id of a request and its line in the log: what is in it, and what never is. No Ray."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

import pytest
from fastapi.testclient import TestClient

from d3llm_ray.serving.access_log import RequestLog, log_through, request_id
from d3llm_ray.serving.front import Front
from d3llm_ray.serving.http import create_app
from d3llm_ray.serving.schemas import CHAT
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.settings import ReplicaSettings

SECRET = "The launch code is 5 7 9"
BODY = {"model": "tiny-random", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 8}
FRESH = re.compile(r"[0-9a-f]{32}")


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """What the access log has said since the last call."""
    caplog.set_level(logging.DEBUG)

    def read() -> list[dict[str, Any]]:
        said = [json.loads(record.getMessage()) for record in caplog.records if record.name == "d3llm_ray.access"]
        caplog.clear()
        return said

    return read


def test_a_line_of_an_answer(client: TestClient, lines: Any) -> None:
    usage = client.post(CHAT, json=BODY, headers={"X-Request-Id": "ann-1"}).json()["usage"]
    (line,) = lines()
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert 0 < line.pop("seconds") < 60
    assert line == {
        "request_id": "ann-1",
        "method": "POST",
        "path": CHAT,
        "status": 200,
        "model": "tiny-random",
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "forwards": usage["forwards"],
        "finish_reason": "length",
        "error": None,
        "disconnected": False,
    }


def test_a_stream_is_logged_once_and_at_its_end(client: TestClient, lines: Any) -> None:
    with client.stream("POST", CHAT, json=BODY | {"stream": True}) as response:
        text = "".join(response.iter_text())
    assert text.endswith("data: [DONE]\n\n")
    (line,) = lines()
    assert (line["status"], line["finish_reason"], line["disconnected"]) == (200, "length", False)
    assert line["completion_tokens"] and line["forwards"]


@pytest.mark.parametrize(
    ("fields", "status", "error"),
    [
        ({"n": -1}, 400, None),
        ({"model": "gpt-4"}, 404, "model_not_found"),
        ({"max_tokens": 10**9}, 400, "invalid_value"),
        ({"stop": [SECRET] * 5}, 400, "invalid_value"),
    ],
)
def test_a_line_of_a_refusal(
    client: TestClient, lines: Any, fields: dict[str, Any], status: int, error: str | None
) -> None:
    answer = client.post(CHAT, json=BODY | fields)
    (line,) = lines()
    assert (answer.status_code, line["status"]) == (status, status)
    assert line["error"] == answer.json()["error"]["code"] == (error or line["error"])
    assert line["finish_reason"] is None and line["completion_tokens"] is None


def test_unknown_routes_and_methods_have_a_line(client: TestClient, lines: Any) -> None:
    client.get("/nothing?prompt=launch")
    client.get(CHAT)
    client.get("/" + "x" * 1000)
    told = [(line["method"], line["path"], line["status"], line["error"]) for line in lines()]
    assert told == [
        ("GET", "/nothing", 404, "404"),
        ("GET", CHAT, 405, "405"),
        ("GET", "/" + "x" * 199, 404, "404"),
    ]


def test_a_path_cannot_write_a_line_of_its_own(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "d3llm_ray.access")
    client.get("/x%0a%7b%22status%22: 200%7d%0d%1b[31m")
    (message,) = [record.getMessage() for record in caplog.records if record.name == "d3llm_ray.access"]
    assert message.isprintable() and message.isascii()


def test_an_unforeseen_error_is_logged_with_the_requests_id(
    client: TestClient, service: ChatService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "card", lambda: 1 / 0)
    answer = client.get("/v1/models", headers={"X-Request-Id": "ann-2"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "ann-2")
    assert answer.json()["error"]["code"] == "internal_error"
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert error.getMessage() == "request ann-2 failed" and error.exc_info is not None
    assert request_id() is None  # outside of a request


def test_prompts_and_answers_are_not_logged(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    answer = client.post(CHAT, json=BODY).json()["choices"][0]["message"]["content"]
    client.post(CHAT, json=BODY | {"stream": True, "user": "ann@example.com"})
    client.post(CHAT, json=BODY | {"temperature": -1})
    client.post(CHAT, json=BODY | {"messages": [{"role": SECRET, "content": SECRET}]})
    client.post(CHAT, json=BODY | {"model": SECRET})
    client.post(CHAT, content=json.dumps(BODY)[:-1], headers={"Content-Type": "application/json"})
    client.post(CHAT, json=BODY, headers={"X-Request-Id": SECRET})
    logged = [record for record in caplog.records if record.name.startswith("d3llm_ray")]
    assert len(logged) == 7
    text = "\n".join(caplog.handler.format(record) for record in logged)
    assert answer and not any(words in text for words in (SECRET, "launch", answer, "ann@example.com"))


def test_the_log_can_be_switched_off(service: ChatService, monkeypatch: pytest.MonkeyPatch, lines: Any) -> None:
    monkeypatch.setattr(service, "settings", service.settings.model_copy(update={"log_requests": False}))
    answer = TestClient(create_app(service)).get("/v1/models")
    assert FRESH.fullmatch(answer.headers["x-request-id"])
    assert lines() == []
    assert "log_prompts" not in ReplicaSettings.model_fields


# Ids


SANE = ["a", "x" * 128, "0af7651916cd43dd8448eb211c80319c", "b1c9-4f/1+2=3~@host:8000_x.y"]
NOT_SANE = ["", "x" * 129, "a b", "a\tb", "a,b", "a;b", 'a"b', "{}", "é", "a\\b", "<b>", "(x)"]


@pytest.mark.parametrize("sent", SANE)
def test_a_sane_id_is_echoed_whatever_the_answer(client: TestClient, service: ChatService, sent: str) -> None:
    for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("GET", "/nothing"), ("GET", CHAT), ("POST", CHAT)):
        answer = client.request(method, path, headers={"X-Request-Id": sent})
        assert answer.headers.get_list("x-request-id") == [sent], (method, path)
    large = client.post(CHAT, content=b"x" * 1_100_000, headers={"X-Request-Id": sent})
    assert (large.status_code, large.headers["x-request-id"]) == (413, sent)


@pytest.mark.parametrize("sent", NOT_SANE)
def test_any_other_id_is_replaced(client: TestClient, lines: Any, sent: str) -> None:
    answer = client.get("/health", headers={"X-Request-Id": sent.encode()})
    assert FRESH.fullmatch(answer.headers["x-request-id"])
    assert [line["request_id"] for line in lines()] == [answer.headers["x-request-id"]]


def test_ids_differ(client: TestClient) -> None:
    assert len({client.get("/health").headers["x-request-id"] for _ in range(20)}) == 20


def test_a_full_replica_answers_with_the_id(
    client: TestClient, service: ChatService, monkeypatch: pytest.MonkeyPatch, lines: Any
) -> None:
    monkeypatch.setattr(service.worker, "_capacity", 0)
    answer = client.post(CHAT, json=BODY, headers={"X-Request-Id": "ann-3"})
    assert (answer.status_code, answer.headers["x-request-id"], answer.headers["retry-after"]) == (429, "ann-3", "1")
    assert [(line["status"], line["error"]) for line in lines()] == [(429, "queue_full")]


# Without a server: how requests end


def run(app: Any, *, headers: Any = (), arriving: Any = (), **options: Any) -> list[Any]:
    """What `app` sends when `RequestLog` stands before it."""
    sent: list[Any] = []
    rest = iter(arriving)

    async def receive() -> Any:
        return next(rest)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": list(headers)}
    log = RequestLog(app, **{"log": True, "echo": True} | options)
    asyncio.run(log(scope, receive, send))
    return sent


START = {"type": "http.response.start", "status": 200, "headers": []}


def test_a_client_that_leaves_is_told_from_one_that_has_its_answer(lines: Any) -> None:
    async def leaves(_: Any, receive: Any, send: Any) -> None:
        await send(dict(START))
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    async def stays(_: Any, receive: Any, send: Any) -> None:
        await send(dict(START))
        await send({"type": "http.response.body", "body": b"a"})
        await receive()

    async def is_cancelled(_: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    for app in (leaves, stays):
        run(app, arriving=[{"type": "http.disconnect"}])
    with pytest.raises(asyncio.CancelledError):
        run(is_cancelled)
    assert [(line["status"], line["disconnected"]) for line in lines()] == [(200, True), (200, False), (None, True)]


def test_behind_serve_the_proxy_echoes(lines: Any) -> None:
    async def answers(scope: Any, receive: Any, send: Any) -> None:
        assert [value for name, value in scope["headers"] if name == b"x-request-id"] == [b"ann-4"]
        await send(dict(START))

    headers = [(b"x-request-id", b"ann-4")]
    assert run(answers, headers=headers, echo=False)[0]["headers"] == []
    assert run(answers, headers=headers)[0]["headers"] == [(b"x-request-id", b"ann-4")]


@pytest.mark.parametrize("sent", [[], [(b"x-request-id", b"a b")], [(b"x-request-id", b"ann-5")]])
def test_the_front_hands_serve_one_sane_id(sent: list[tuple[bytes, bytes]]) -> None:
    """Serve itself would echo and log whatever a client sends."""
    seen: list[Any] = []

    async def serve_proxy(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(value for name, value in scope["headers"] if name == b"x-request-id")

    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [(b"host", b"x"), *sent]}
    asyncio.run(Front(serve_proxy, lambda name: 1)(scope, None, None))  # type: ignore[arg-type]
    (value,) = seen
    assert value == b"ann-5" if sent[-1:] == [(b"x-request-id", b"ann-5")] else FRESH.fullmatch(value.decode())


def test_in_a_replica_all_is_written_as_serve_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    package, serves = logging.getLogger("d3llm_ray"), logging.getLogger("ray.serve.test")
    written: list[str] = []
    monkeypatch.setattr(serves, "handlers", [])
    monkeypatch.setattr(package, "handlers", package.handlers)
    monkeypatch.setattr(package, "propagate", package.propagate)
    log_through("ray.serve.test")
    handler = logging.Handler()
    handler.emit = lambda record: written.append(record.getMessage())  # type: ignore[method-assign]
    serves.handlers.append(handler)  # later than that, as where Serve's logging is configured anew
    logging.getLogger("d3llm_ray.access").info("a line")
    logging.getLogger("d3llm_ray.serving").error("an error")
    assert written == ["a line", "an error"]
