"""Servers for clients: one that does as a test tells it, without a model, and one of a random model without Ray."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.serving.local import serve_locally
from d3llm_ray.serving.settings import ReplicaSettings

Answer = tuple[int, dict[str, str], Any]  # status, headers, body: JSON, text, or a stream's pieces; status 0 hangs up


@dataclass
class Scripted:
    """What was asked, and how it is answered: `script(number of the request, its body)`."""

    script: Callable[[int, dict[str, Any]], Answer]
    url: str = ""
    key: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    left: int = 0  # clients that went away while a stream was sent


def said(text: str) -> Answer:
    return 200, {}, {"object": "chat.completion", "choices": [{"message": {"content": text}}]}


def refusal(status: int, message: str = "no", code: str | None = None, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, {"error": {"message": message, "type": "x", "param": None, "code": code}}


def echo(_: int, body: dict[str, Any]) -> Answer:
    return said(str(body["messages"][0]["content"]))


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    """Start a server with a script, and what it tells by GET of a path; it ends with the test."""
    servers: list[ThreadingHTTPServer] = []

    def start(
        script: Callable[[int, dict[str, Any]], Answer] = echo, key: str | None = None, told: Any = None
    ) -> Scripted:
        pages = {"/v1/models": {"object": "list", "data": [{"id": "scripted"}]}} | (told or {})
        state, lock = Scripted(script, key=key), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                wanted = None if state.key is None else f"Bearer {state.key}"
                if self.headers.get("Authorization") != wanted:
                    self._send(*refusal(401))
                elif self.path in pages:
                    self._send(200, {}, pages[self.path])
                else:
                    self._send(404, {}, {"error": {"message": "no such page"}})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(state.asked)
                    state.asked.append(body)
                    state.headers.append(dict(self.headers))
                    state.paths.append(self.path)
                    state.at_once += 1
                    state.most_at_once = max(state.most_at_once, state.at_once)
                try:
                    answer = state.script(number, body)
                finally:
                    with lock:
                        state.at_once -= 1
                if answer[0] == 0:
                    self.close_connection = True
                else:
                    self._send(*answer)

            def _send(self, status: int, headers: dict[str, str], body: Any) -> None:
                if isinstance(body, Iterator):
                    self._stream(body)
                    return
                content = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def _stream(self, pieces: Iterator[str]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
                try:
                    for piece in pieces:
                        self.wfile.write(piece.encode())
                        self.wfile.flush()
                except OSError:
                    state.left += 1

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        return state

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def served(tiny_checkpoint: Path) -> Iterator[str]:
    """Base URL of a random model, `tiny-random`, served in this process."""
    settings = ReplicaSettings(model=str(tiny_checkpoint), max_batch_size=4, max_tokens=32, max_tokens_limit=128)
    with serve_locally(settings) as url:
        yield url


@pytest.fixture(scope="session")
def offline(tiny_checkpoint: Path) -> DiffusionLLM:
    """The same model with an engine of its own."""
    return DiffusionLLM.from_pretrained(tiny_checkpoint)
