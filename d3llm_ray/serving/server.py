"""Running the application: in the foreground until Ctrl-C, or for as long as a block of code runs."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import ray
from ray import serve

from d3llm_ray.cluster import connect
from d3llm_ray.errors import InputError, WorkError, require
from d3llm_ray.progress import Progress
from d3llm_ray.serving.app import application
from d3llm_ray.serving.front import PROXY_OPTIONS
from d3llm_ray.serving.settings import ServeSettings

APPLICATION = "d3llm"
HEALTHY_WITHIN_S = 30.0
PORTS_TRIED = 3
STOPPED_WITHIN_S = 15.0  # replicas that have nothing left to do


def run(settings: ServeSettings, progress: Progress | None = None) -> None:
    """Serve until interrupted (Ctrl-C, SIGTERM), finish what has begun, and take everything down.

    So too when interrupted while it starts: whoever sees it answer may stop it, and that is before it can say so.
    `InputError` before Ray starts; `KeyboardInterrupt` when interrupted again.
    """
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler of SIGTERM aborts the process: nothing would be taken down.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    stopping = False
    try:
        with serve_in_background(settings, progress) as url:
            try:
                print(_banner(settings, url), file=sys.stderr, flush=True)
                threading.Event().wait()
            except KeyboardInterrupt:
                stopping = True
                limit = f"within {settings.drain_timeout_s:g} s; Ctrl-C again stops at once"
                print(f"stopping: answers that have begun are finished {limit}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        if stopping:
            raise
        print("stopped while it started", file=sys.stderr, flush=True)


@contextmanager
def serve_in_background(settings: ServeSettings, progress: Progress | None = None) -> Iterator[str]:
    """Serve while the block runs; yields the base URL, such as `http://127.0.0.1:8000`, once it answers.

    Uses the Ray that is there or starts an embedded one, and afterwards ends what it started and nothing else. Where
    Serve runs already its own address holds, and `port` must name it.
    """
    app = application(settings, num_replicas=settings.replicas)
    if not ray.is_initialized() and "RAY_ADDRESS" not in os.environ:
        _free_port(settings)
    progress = progress or Progress()
    with ExitStack() as running:
        with progress.stage("serve", settings.replicas, "replica"):
            running.enter_context(_connected())
            port = running.enter_context(_http(settings))
            running.callback(_drain, settings.drain_timeout_s)
            serve.run(app, name=APPLICATION, route_prefix="/")
            url = f"http://{_reachable(settings.host)}:{port}"
            _wait_healthy(url)
            progress.update(settings.replicas)
        yield url


def _drain(timeout_s: float) -> None:
    """Delete the application and wait until its replicas have finished their answers, or may wait no longer.

    Before Serve is shut down, which ends its proxy, and with it every answer, at once.
    """
    serve.delete(APPLICATION, _blocking=False)
    deadline = time.monotonic() + timeout_s + STOPPED_WITHIN_S
    while APPLICATION in serve.status().applications and time.monotonic() < deadline:
        time.sleep(0.1)


@contextmanager
def _connected() -> Iterator[None]:
    had_ray = ray.is_initialized()
    connect()
    try:
        yield
    finally:
        if not had_ray:
            ray.shutdown()


@contextmanager
def _http(settings: ServeSettings) -> Iterator[int]:
    """Start Serve's HTTP proxy, unless Serve runs already; yields its port."""
    if _serve_runs():
        require(settings.port > 0, "port", settings.port, "the port of the Serve that runs on this cluster")
        yield settings.port
        return
    try:
        yield _started(settings)
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]


def _started(settings: ServeSettings) -> int:
    """Start Serve; returns its proxy's port. Where any will do, one that was taken meanwhile is let go for another."""
    attempts = 1 if settings.port else PORTS_TRIED
    while True:
        port = _free_port(settings)
        try:
            http_options = {"host": settings.host, "port": port}
            serve.start(proxy_location="HeadOnly", http_options=http_options, controller_options=PROXY_OPTIONS)
            return port
        except RuntimeError as error:
            attempts -= 1
            if not attempts or "Failed to bind" not in str(error):
                raise
            serve.shutdown()  # type: ignore[no-untyped-call]


def _serve_runs() -> bool:
    return bool(serve.status().proxies)


def _free_port(settings: ServeSettings) -> int:
    """The port to listen on, or `InputError` when another process has it; 0 becomes a free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InputError(
            f"host: got {settings.host!r}: {error.strerror}; accepted: an address of this machine"
        ) from error
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ended connections do not occupy a port
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise InputError(
                    f"port: {settings.port} is in use on {settings.host}; accepted: a free port, or 0 for any"
                ) from error
            field = "port" if error.errno == errno.EACCES else "host"
            raise InputError(f"{field}: cannot listen on {settings.host}:{settings.port}: {error.strerror}") from error
        port: int = probe.getsockname()[1]
        return port


def _reachable(host: str) -> str:
    """The host part of a URL to this machine for a server that listens on `host`."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _wait_healthy(url: str) -> None:
    """Serve says RUNNING a moment before its proxy knows the route."""
    deadline = time.monotonic() + HEALTHY_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if time.monotonic() > deadline:
                raise WorkError(f"{url}/health did not answer within {HEALTHY_WITHIN_S:g} s: {error}") from error
            time.sleep(0.1)


def _banner(settings: ServeSettings, url: str) -> str:
    models = [model.checked() for model in settings.each()]
    asks = any(model.api_keys_required or model.api_keys is not None for model in models)
    keys = "asked for on every route but /health and /ready" if asks else "none: whoever reaches the port is answered"
    body = f'{{"model": "{models[0].model_id}", "messages": [{{"role": "user", "content": "..."}}]}}'
    lines: list[str] = []
    for model in models:
        decoder = model.decoding()
        lines += [
            f"model    {model.model} ({model.dtype}, {model.device}, {settings.replicas} replica(s))",
            *(f"adapter  {name} {folder}" for name, folder in model.adapters.items()),
            f"decoder  {decoder.name} {decoder.settings()}",
            f"slots    {model.max_batch_size} a replica, {model.max_queue} more may wait",
        ]
    return "\n".join(
        (
            *lines,
            f"keys     {keys}",
            f"url      {url}/v1 (Ctrl-C stops)",
            f"try      curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        )
    )
