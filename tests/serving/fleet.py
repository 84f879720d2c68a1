"""Clients of applications on Ray Serve that come, go, scale and are redeployed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import httpx2 as httpx
import psutil

CHAT = "/v1/chat/completions"
PATIENCE_S = 60.0
CLIENT = httpx.Client(timeout=PATIENCE_S)  # one for all: to make one takes longer than a short answer


def ask(url: str, model: str = "tiny-random", **fields: Any) -> httpx.Response:
    """One chat request; a client that fails to connect, or is cut off, raises."""
    messages = [{"role": "user", "content": "Tom has 5 apples and buys 7 more. How many now?"}]
    return CLIENT.post(url + CHAT, json={"model": model, "messages": messages, **fields})


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def status_of(url: str) -> int:
    """The status of a GET; 0 when there is no answer."""
    try:
        return CLIENT.get(url).status_code
    except httpx.TransportError:
        return 0


def eventually(condition: Callable[[], bool], within_s: float) -> float:
    """Wait for a condition; returns the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + within_s, f"not within {within_s:g} s"
        time.sleep(0.05)
    return time.monotonic() - began


def replica_pids(application: str) -> set[int]:
    """Processes of an application's replicas on this machine."""
    begin = f"ray::ServeReplica:{application}:"
    return {one.pid for one in psutil.process_iter(["cmdline"]) if "".join(one.info["cmdline"] or []).startswith(begin)}


class Clients:
    """`count` clients that ask, each as soon as it is answered and `every_s` after it last asked, while a block runs.

    `statuses` has the status of each answer, 0 where there was none.
    """

    def __init__(self, url: str, count: int, every_s: float = 0.0, **fields: Any) -> None:
        self.statuses: list[int] = []
        self.problems: list[str] = []
        self._ended = threading.Event()
        self._ask = lambda: ask(url, **fields)
        self._every_s = every_s
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _run(self) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                answer = self._ask()
                self.statuses.append(answer.status_code)
                if answer.status_code != 200:
                    self.problems.append(answer.text)
            except httpx.TransportError as error:
                self.statuses.append(0)
                self.problems.append(repr(error))
            self._ended.wait(max(0.0, self._every_s - (time.monotonic() - began)))
