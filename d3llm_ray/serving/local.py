"""One replica's routes in this process, without Ray: what offline verbs and tests talk to."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from d3llm_ray.errors import WorkError
from d3llm_ray.serving.connections import EndsSlowReaders
from d3llm_ray.serving.heads import BoundedConnection
from d3llm_ray.serving.http import create_app
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.settings import ReplicaSettings

HOST = "127.0.0.1"
STARTED_WITHIN_S = 30.0
BACKLOG = 2048  # connections
ENDED_WITHIN_S = 5  # however long those who are still connected would stay


@contextmanager
def serve_locally(settings: ReplicaSettings) -> Iterator[str]:
    """Serve on a free loopback port while the block runs; yields the base URL, such as `http://127.0.0.1:41233`.

    Raises `InputError` for what the model or the decoder does not accept.
    """
    service = ChatService(settings)
    # The protocol by its number, or asyncio does not switch Nagle off: 40 ms more for an answer.
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind((HOST, 0))
        listener.listen(BACKLOG)  # who comes before the server does waits
        app = EndsSlowReaders(create_app(service), settings.slow_reader_timeout_s)
        options: dict[str, Any] = {
            "http": BoundedConnection,
            "log_level": "warning",
            "lifespan": "off",
            "timeout_graceful_shutdown": ENDED_WITHIN_S,
        }
        server = uvicorn.Server(uvicorn.Config(app, **options))
        running = threading.Event()

        async def run() -> None:
            service.start()  # on the loop that will submit requests
            running.set()
            await server.serve([listener])

        thread = threading.Thread(target=lambda: asyncio.run(run()), name="http", daemon=True)
        thread.start()
        if not running.wait(STARTED_WITHIN_S):
            raise WorkError(f"the local server did not start within {STARTED_WITHIN_S:g} s")
        try:
            yield f"http://{HOST}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            service.stop()
