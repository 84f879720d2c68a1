"""A server that is asked to stop ends with 0 and takes down what it started, in its start as well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from d3llm_ray.serving import server
from d3llm_ray.serving.schemas import HEALTH
from d3llm_ray.serving.settings import ServeSettings
from tests.chaos.cluster import free_port
from tests.serving.fleet import status_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """A SIGTERM that nobody has asked for would end the tests."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, before)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)  # interrupted


def stage(name: str, at: str, done: list[str]) -> None:
    if name == at:
        stop()
    done.append(name)


@pytest.mark.parametrize(
    ("at", "done", "told"),
    [
        ("start", ["taken down"], "stopped while it started"),
        ("up", ["start", "taken down"], "stopping: answers that have begun"),
    ],
)
def test_sigterm_at_any_time_takes_the_server_down(
    at: str, done: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reached: list[str] = []

    @contextmanager
    def serving(*_: Any) -> Iterator[str]:
        try:
            stage("start", at, reached)
            yield "http://127.0.0.1:1"
        finally:
            reached.append("taken down")

    monkeypatch.setattr(server, "serve_in_background", serving)
    if at == "up":
        monkeypatch.setattr(server, "_banner", lambda *_: stage("up", at, reached))
    try:
        server.run(ServeSettings())
    except KeyboardInterrupt:  # would end the tests
        pytest.fail("it is interrupted, and not stopped")
    assert reached == done
    assert told in capsys.readouterr().err


def test_a_second_signal_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def serving(*_: Any) -> Iterator[str]:
        yield "http://127.0.0.1:1"
        stop()  # while it drains

    monkeypatch.setattr(server, "serve_in_background", serving)
    monkeypatch.setattr(server, "_banner", lambda *_: stop())
    with pytest.raises(KeyboardInterrupt):
        server.run(ServeSettings())


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_who_sees_it_answer_may_stop_it() -> None:
    """At once, which is before it says that it is up."""
    port = free_port()
    words = ["-m", "d3llm_ray.cli", "serve", "--model", "tiny-llada", "--port", str(port)]
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, start_new_session=True)
    try:
        while status_of(f"http://127.0.0.1:{port}{HEALTH}") != 200:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    finally:
        if process.poll() is None:
            process.kill()
