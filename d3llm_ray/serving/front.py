"""What stands before Serve's own proxy: it refuses requests that no replica has room for.

A request costs Serve's proxy and a replica several milliseconds even when it is refused, and what comes after it waits,
health checks among it. Refused here it costs a fraction of one. Serve's proxies call `middlewares` when they start, as
`PROXY_OPTIONS` tells them: nothing here may import torch.

It also tells probes that an application which is taken down is alive, and not ready, while it finishes its answers.

What there is room for is what a replica says in a header of its answers, times the replicas that run. Until a first
answer has come by, and in a Serve that was started without those options, all is handed on and the replicas refuse.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack

import uvicorn.config
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d3llm_ray.metrics import ServingMetrics
from d3llm_ray.serving.access_log import REQUEST_ID, sane_request_id, with_request_id
from d3llm_ray.serving.connections import patient
from d3llm_ray.serving.errors import queue_full
from d3llm_ray.serving.heads import BoundedConnection
from d3llm_ray.serving.schemas import DECODING, HEALTH, READY
from d3llm_ray.serving.standin import ALIVE, DRAINING, StandIn

logger = logging.getLogger("d3llm_ray.serving")

# Serve's `controller_options`; the proxies inherit the controller's environment.
PROXY_OPTIONS = {
    "runtime_env": {"env_vars": {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "d3llm_ray.serving.front:middlewares"}}
}
RECOUNT_S = 2.0  # a replica that has been added is made use of as soon
LULL_S, LONGEST_WAIT_S = 0.005, 0.5
_ROOM_HEADER = "x-d3llm-room"
# What a probe is told of an application that is taken down while its answers are finished: alive, and not ready.
_PROBES = {HEALTH: ALIVE, READY: DRAINING}
_REFUSAL = queue_full().response()


class TellsRoom:
    """In a replica: each answer says for how many requests every replica of the application has room.

    None: others refuse, as behind a router. And how long a client may take to read what is sent, as nothing that is
    sent in a replica ever waits for a client.
    """

    def __init__(self, app: ASGIApp, application: str, model: str, room: int | None, slow_reader_s: float) -> None:
        self._app = app
        told = {"application": application, "model": model, "room": room, "slow_reader_s": slow_reader_s}
        self._header = json.dumps(told)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_ROOM_HEADER] = self._header
            await send(message)

        await self._app(scope, receive, telling)


class Room:
    """Requests of one application that this proxy has handed on, and how many there may be."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.slow_reader_s: float | None = None
        self._told = ""
        self._name, self._each, self._replicas = "", 0, 1
        self._metrics: ServingMetrics | None = None
        self._counted = float("-inf")
        self._counting: asyncio.Task[None] | None = None

    def learn(self, told: str) -> None:
        """Take in what a replica says; another deployment may say otherwise."""
        if told == self._told:
            return
        said = json.loads(told)
        self._told, self.slow_reader_s, self._metrics = told, said["slow_reader_s"], None
        if said["room"] is not None:
            self._name, self._each = said["application"], said["room"]
            self._metrics = ServingMetrics(said["model"], said["application"])

    @property
    def limited(self) -> bool:
        """Whether a request may be one too many."""
        return self._metrics is not None

    def refuses(self) -> bool:
        """Whether another request would be too many. Counts the refusal."""
        if self._metrics is None or self.in_flight < self._each * max(self._replicas, 1):
            return False
        self._metrics.refused()
        return True

    def take(self) -> ExitStack:
        """A place, which is free again when that is closed."""

        def leave() -> None:
            self.in_flight -= 1

        self.in_flight += 1
        place = ExitStack()
        place.callback(leave)
        return place

    def recount(self, count_replicas: Callable[[str], int]) -> None:
        """Have the replicas counted, in a thread, unless that was done a moment ago."""
        if not self.limited or self._counting is not None or time.monotonic() - self._counted < RECOUNT_S:
            return

        async def count() -> None:
            try:
                self._replicas = await asyncio.to_thread(count_replicas, self._name)
            except Exception as error:  # the controller is away: what was so a moment ago must do
                logger.warning("cannot count the replicas of %s: %s", self._name, error)
            self._counted, self._counting = time.monotonic(), None

        self._counting = asyncio.create_task(count())


class Front:
    """ASGI middleware. `count_replicas` tells how many replicas of an application run; it may block."""

    def __init__(self, app: ASGIApp, count_replicas: Callable[[str], int]) -> None:
        self._app = app
        self._count_replicas = count_replicas
        self._rooms: defaultdict[str, Room] = defaultdict(Room)  # by the path before the application's routes
        self._arrivals, self._arrived = 0, float("-inf")
        self._shower: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # Serve would make an id as well, but echo and log any that is sent.
            scope = with_request_id(scope, sane_request_id(scope))
        route = _route(scope)
        if route is None:
            await self._app(scope, receive, _tapped(send))
            return
        prefix = scope["path"].removesuffix(route)

        def learn(status: int, told: str) -> None:
            if status != 404:  # no application has its routes there
                self._rooms[prefix].learn(told)
                self._rooms[prefix].recount(self._count_replicas)

        if prefix not in self._rooms:
            await self._app(scope, receive, _tapped(send, learn))
            return
        room = self._rooms[prefix]
        if route in _PROBES:
            await self._hand_on(scope, receive, _tapped(send, learn), _PROBES[route] if room.in_flight else None)
            return
        if room.slow_reader_s is not None:
            send = patient(send, room.slow_reader_s)
        room.recount(self._count_replicas)
        alone = time.monotonic() - self._arrived > LULL_S
        self._arrivals, self._arrived = self._arrivals + 1, time.monotonic()
        if room.refuses():
            await _refuse(scope, send)
            return
        place = room.take()
        try:
            if room.limited and not alone:
                await self._lull()
            # Free before a client can know that its answer is complete, and ask again.
            tapped = _tapped(send, learn, place.close)
            await self._hand_on(scope, receive, tapped, DRAINING if room.in_flight > 1 else None)
        finally:
            place.close()

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send, taken_down: Response | None) -> None:
        answer = StandIn(send, _ROOM_HEADER, taken_down, sane_request_id(scope))
        try:
            await self._app(scope, receive, answer)
        except Exception as error:  # Serve's, for a replica that has died
            logger.warning("Serve has no answer to a request: %s", error)
        await answer.close()

    async def _lull(self) -> None:
        """Refusals and health checks first: a request that has its place lets a shower of others pass by."""
        if self._shower is None:
            self._shower = asyncio.create_task(self._until_lull())
        await asyncio.shield(self._shower)

    async def _until_lull(self) -> None:
        deadline = time.monotonic() + LONGEST_WAIT_S
        arrivals = 0
        while self._arrivals != arrivals and time.monotonic() < deadline:
            arrivals = self._arrivals
            await asyncio.sleep(LULL_S)
        self._shower = None


def _route(scope: Scope) -> str | None:
    """The route of ours that a request's path ends with, where it is one that matters here."""
    if scope["type"] == "http":
        for method, route in (*(("POST", route) for route in DECODING), *(("GET", route) for route in _PROBES)):
            if scope["method"] == method and scope["path"].endswith(route):
                return route
    return None


def _nothing(*_: object) -> None: ...


def _tapped(send: Send, learn: Callable[[int, str], None] = _nothing, end: Callable[[], None] = _nothing) -> Send:
    """A `send` that takes what replicas tell the front out of an answer's headers, and sees an answer's end."""

    async def tapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            told = headers.get(_ROOM_HEADER)
            if told is not None:
                del headers[_ROOM_HEADER]
                learn(message["status"], told)
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            end()
        await send(message)

    return tapped


async def _refuse(scope: Scope, send: Send) -> None:
    headers = [*_REFUSAL.raw_headers, (REQUEST_ID, sane_request_id(scope))]
    await send({"type": "http.response.start", "status": _REFUSAL.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": _REFUSAL.body})


def running_replicas(application: str, deployment: str | None = None) -> int:
    """How many replicas of an application, or of one deployment of it, take requests, as Serve's controller says."""
    deployments = serve.status().applications[application].deployments
    chosen = deployments.values() if deployment is None else [deployments[deployment]]
    states = [state for one in chosen for state in one.replica_states.items()]
    return sum(count for name, count in states if name == "RUNNING")


def middlewares() -> list[Middleware]:
    """Serve's callback: called in the proxy of each node when it starts, before its HTTP server."""
    # Serve lets uvicorn choose how to read connections, and has no option for it.
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{BoundedConnection.__module__}:{BoundedConnection.__name__}"
    return [Middleware(Front, count_replicas=running_replicas)]
