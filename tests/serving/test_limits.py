"""How much a client may send, and how long it may take, over sockets: a replica's routes in this process, no Ray."""

from __future__ import annotations

import http.client
import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from d3llm_ray.serving import heads
from d3llm_ray.serving.front import middlewares
from d3llm_ray.serving.heads import MAX_HEAD_BYTES, MAX_HEADERS, BoundedConnection
from d3llm_ray.serving.local import serve_locally
from d3llm_ray.serving.schemas import CHAT
from d3llm_ray.serving.settings import ReplicaSettings

BODY = {"model": "tiny-random", "messages": [{"role": "user", "content": "3 + 4"}], "max_tokens": 4}
PATIENCE_S = 10.0
ENDLESS = 64 * MAX_HEAD_BYTES  # of what the server must not wait for the end of


@pytest.fixture(scope="module")
def address(tiny_checkpoint: Path) -> Iterator[tuple[str, int]]:
    with serve_locally(ReplicaSettings(model=str(tiny_checkpoint))) as url:
        parts = urlsplit(url)
        yield str(parts.hostname), int(parts.port or 0)


def ask(address: tuple[str, int], method: str, path: str, **sent: Any) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE_S)
    try:
        connection.request(method, path, **sent)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def send_raw(address: tuple[str, int], *pieces: bytes) -> bytes:
    """Send, until the server hangs up or all is sent, and return what it says until it hangs up or ends an answer."""
    answer = b""
    with socket.create_connection(address, timeout=PATIENCE_S) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
            while b"}" not in answer and (piece := client.recv(65536)):
                answer += piece
        except (BrokenPipeError, ConnectionResetError):
            pass  # what it says may be lost where it hangs up with bytes unread
    return answer


def test_a_head_within_the_limits_is_answered(address: tuple[str, int]) -> None:
    many = {f"X-Header-{n}": "x" for n in range(MAX_HEADERS - 5)}
    for headers in (many, {"X-Large": "x" * (MAX_HEAD_BYTES - 1000)}):
        assert ask(address, "GET", "/v1/models", headers=headers)[0] == 200


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/v1/models", {f"X-Header-{n}": "x" for n in range(MAX_HEADERS + 1)}),
        ("/v1/models", {"X-Large": "x" * (MAX_HEAD_BYTES + 1)}),
        ("/v1/models", {f"X-Header-{n}": "x" * 1000 for n in range(40)}),
        ("/v1/models?q=" + "x" * (MAX_HEAD_BYTES + 1), {}),
        ("/v1/models/" + "x" * (MAX_HEAD_BYTES + 1), {}),
        ("/health", {"Authorization": "Bearer " + "x" * (MAX_HEAD_BYTES + 1)}),
    ],
    ids=["many", "large", "together", "query", "path", "health"],
)
def test_a_larger_head_is_refused_as_openai_would(address: tuple[str, int], path: str, headers: dict[str, str]) -> None:
    status, answer = ask(address, "GET", path, headers=headers)
    assert status == 431
    assert answer["error"] == {
        "message": "headers: too large or too many; accepted: at most 32768 bytes and 100 headers",
        "type": "invalid_request_error",
        "param": None,
        "code": "headers_too_large",
    }


@pytest.mark.parametrize(
    "pieces",
    [
        [b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Endless: ", *[b"x" * 8192] * (ENDLESS // 8192)],
        [b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", *[b"X-Another: xxxxxxxxxxx\r\n" * 300] * (ENDLESS // 6900)],
        [b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX", *[b"x" * 8192] * (ENDLESS // 8192)],
        [b"GET /", *[b"x" * 8192] * (ENDLESS // 8192)],
    ],
    ids=["value", "headers", "name", "path"],
)
def test_an_endless_head_is_cut_off(address: tuple[str, int], pieces: list[bytes]) -> None:
    """The parser itself would take in all of it before anybody could refuse."""
    answer = send_raw(address, *pieces)  # or else it would wait for more
    if answer:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
        assert b"connection: close" in head.split(b"\r\n")
        assert json.loads(body)["error"]["code"] == "headers_too_large"
    assert ask(address, "GET", "/health")[0] == 200


CHUNKED = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [b"0\r\nX-Endless: ", *[b"x" * 8192] * (ENDLESS // 8192)],
        [b"0\r\n", *[b"X-Another: xxxxxxxxxxx\r\n" * 300] * (ENDLESS // 6900)],
        [b"5;", *[b"x" * 8192] * (ENDLESS // 8192)],
    ],
    ids=["trailer", "trailers", "extension"],
)
def test_what_comes_between_and_after_the_parts_of_a_body_ends_too(
    address: tuple[str, int], pieces: list[bytes]
) -> None:
    assert b"200 OK" not in send_raw(address, CHUNKED.encode(), *pieces)
    assert ask(address, "GET", "/health")[0] == 200


def test_a_body_in_the_smallest_chunks_is_answered(address: tuple[str, int]) -> None:
    body = json.dumps(BODY | {"user": "x" * 8000}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    assert len(chunks) > MAX_HEAD_BYTES
    answer = send_raw(address, CHUNKED.encode(), chunks, b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_one_connection_may_ask_much_in_a_row(address: tuple[str, int]) -> None:
    """The limit is of each head, not of a connection."""
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE_S)
    for _ in range(4):
        connection.request("GET", "/health", headers={"X-Large": "x" * (MAX_HEAD_BYTES - 1000)})
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"status":"ok"}')
    connection.close()


def test_a_body_beyond_the_limit(address: tuple[str, int]) -> None:
    status, answer = ask(address, "POST", CHAT, body=json.dumps(BODY | {"user": "x" * 1_000_000}))
    assert status == 413
    assert answer["error"]["message"] == "body: too large; accepted: at most 1000000 bytes"


@pytest.mark.parametrize("sent", [b"", b"GET /health HT"], ids=["nothing", "half"])
def test_a_head_that_does_not_come_is_not_waited_for(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(heads, "HEAD_WITHIN_S", 0.3)
    with socket.create_connection(address, timeout=PATIENCE_S) as client:
        began = time.monotonic()
        client.sendall(sent)
        assert client.recv(1) == b""
        assert 0.2 < time.monotonic() - began < 3


def test_a_head_that_trickles_is_not_waited_for_and_an_answer_is(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "HEAD_WITHIN_S", 0.5)
    with socket.create_connection(address, timeout=PATIENCE_S) as client:
        for _ in range(2):
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")
            time.sleep(0.7)  # between two requests a connection may rest
        began, cut = time.monotonic(), False
        while not cut and time.monotonic() - began < 5:
            try:
                client.sendall(b"G" if time.monotonic() - began < 0.1 else b"x")
                client.settimeout(0.05)
                cut = client.recv(65536) == b""
            except TimeoutError:
                pass
            except (BrokenPipeError, ConnectionResetError):
                cut = True
        assert cut and time.monotonic() - began < 3


IDLE = 1000


def accept_seconds(address: tuple[str, int]) -> float:
    """The middle one of 50 times from a new connection to its answer."""
    times = []
    for _ in range(50):
        began = time.monotonic()
        assert ask(address, "GET", "/health")[0] == 200
        times.append(time.monotonic() - began)
    return sorted(times)[len(times) // 2]


def test_a_thousand_idle_connections_change_nothing(address: tuple[str, int]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * IDLE + 500  # both ends are in this process
    if soft < wanted:
        if hard < wanted:
            pytest.skip(f"at most {hard} open files")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    alone = accept_seconds(address)
    with ExitStack() as idle:
        for _ in range(IDLE):
            idle.enter_context(socket.create_connection(address, timeout=PATIENCE_S))
        beside = accept_seconds(address)
        assert ask(address, "POST", CHAT, body=json.dumps(BODY), headers={"Content-Type": "application/json"})[0] == 200
    print(f"a new connection's answer: {alone * 1000:.2f} ms alone, {beside * 1000:.2f} ms beside {IDLE} idle ones")
    assert beside < 2 * alone + 0.01


def test_serves_proxy_reads_connections_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn
    from uvicorn.config import HTTP_PROTOCOLS

    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])
    middlewares()
    config = uvicorn.Config(lambda: None, factory=True, lifespan="off", log_config=None)  # as Serve makes it
    config.load()
    assert config.http_protocol_class is BoundedConnection
