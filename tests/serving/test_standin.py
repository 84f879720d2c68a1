"""What clients hear in place of Serve's own answers: while an application drains, and when a replica has died."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from d3llm_ray.serving.standin import DRAINING, StandIn

HEADER = "x-room"


def answered(messages: list[Any], draining: bool = False) -> tuple[int, dict[str, str], str]:
    """Status, headers and body that a client gets of Serve's `messages`."""
    sent: list[Any] = []

    async def main() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        answer = StandIn(send, HEADER, DRAINING if draining else None, b"mine")
        for message in messages:
            await answer(message)
        await answer.close()

    asyncio.run(main())
    start, *rest = sent
    assert [message.get("more_body", False) for message in rest] == [True] * (len(rest) - 1) + [False]
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, b"".join(message["body"] for message in rest).decode()


def start(status: int, **headers: str) -> dict[str, Any]:
    told = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": told}


def body(text: str, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


@pytest.mark.parametrize("status", [200, 400, 404, 500, 503])
def test_answers_of_a_replica_pass(status: int) -> None:
    messages = [start(status, x_room="5"), body("a", True), body("b")]
    assert answered(messages, draining=True) == (status, {"x-room": "5"}, "ab")


@pytest.mark.parametrize("draining", [False, True])
def test_an_unknown_route_is_a_503_only_while_answers_are_finished(draining: bool) -> None:
    messages = [start(404, content_type="text/plain", x_request_id="mine"), body("Path '/' not found", True), body("")]
    status, headers, text = answered(messages, draining)
    assert (status, headers["x-request-id"]) == (503 if draining else 404, "mine")
    if draining:
        assert headers["retry-after"] == "1" and int(headers["content-length"]) == len(text)
        error = json.loads(text)["error"]
        assert (error["type"], error["code"]) == ("service_unavailable", "draining")


@pytest.mark.parametrize("told", [[start(500, content_type="text/plain"), body("Internal Server Error")], []])
def test_a_request_whose_replica_has_died_may_be_asked_again(told: list[Any]) -> None:
    status, headers, text = answered(told)
    assert (status, headers["retry-after"], headers["x-request-id"]) == (503, "1", "mine")
    assert json.loads(text)["error"]["code"] == "replica_lost"


def test_a_stream_whose_replica_has_died_ends_with_an_error_event() -> None:
    begun = [start(200, x_room="5", content_type="text/event-stream; charset=utf-8"), body("data: 1\n\n", True)]
    status, _, text = answered(begun)
    first, last, rest = text.split("\n\n")
    assert (status, first, rest) == (200, "data: 1", "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert answered([*begun, body("data: [DONE]\n\n")])[2] == "data: 1\n\ndata: [DONE]\n\n"
