"""Several models behind one URL: which of them a request is for.

A request goes to the deployment whose model its body names, or its query; all the rest of it is that deployment's
affair, so that every route is the same with one model or with several. Only what concerns all models is answered
here: the list of models, and health. What asks for no model goes to the first one that runs.

No torch: the process that routes is small, and there may be several.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d3llm_ray import __version__
from d3llm_ray.serving.errors import ApiError, install_handlers, model_not_found
from d3llm_ray.serving.exchange import collect, replay, whole_body
from d3llm_ray.serving.limits import BodyLimit
from d3llm_ray.serving.schemas import HEALTH, READY

MODELS = "/v1/models"
LISTED_WITHIN_S = 5.0  # a replica that tells nothing for so long is listed with what is known of it


@dataclass
class Served:
    """One deployment: the ids it answers to, the model's own first, then its adapters', and the way to its routes."""

    ids: tuple[str, ...]
    app: ASGIApp
    cards: list[dict[str, Any]] = field(default_factory=list)  # as its replicas last told

    def known_cards(self, created: int) -> list[dict[str, Any]]:
        """What can be said while no replica runs."""
        bare = {"object": "model", "created": created, "owned_by": "d3llm-ray"}
        return self.cards or [{"id": name, **bare} for name in self.ids]


@dataclass(frozen=True)
class Condition:
    """How a deployment is: the replicas that take requests, and whether it has as many as it should."""

    running: int
    healthy: bool


Conditions = Callable[[], Mapping[str, Condition]]  # by deployment; may block


class Router:
    """The routes over several deployments, by name. `conditions` tells how they are."""

    def __init__(self, deployments: Mapping[str, Served], conditions: Conditions) -> None:
        self._deployments = dict(deployments)
        self._conditions = conditions
        self._created = int(time.time())
        self._by_id = {name: served for served in self._deployments.values() for name in served.ids}

    async def conditions(self) -> dict[str, Condition]:
        """Every deployment's; one that Serve does not know has no replica."""
        told = await asyncio.to_thread(self._conditions)
        return {name: told.get(name, Condition(0, False)) for name in self._deployments}

    async def models(self, request: Request) -> list[dict[str, Any]] | Response:
        """The cards of all models; instead a replica's refusal, where it refuses the request. Starts no replica."""
        conditions = await self.conditions()
        pairs = self._deployments.items()
        told = await asyncio.gather(
            *(self._ask_cards(served, request.scope) for name, served in pairs if conditions[name].running)
        )
        refusals = [answer for answer in told if answer is not None]
        if refusals:
            return refusals[0]
        return [card for served in self._deployments.values() for card in served.known_cards(self._created)]

    async def _ask_cards(self, served: Served, scope: Scope) -> Response | None:
        asked = {**scope, "path": scope.get("root_path", "") + MODELS, "query_string": b""}
        asked["raw_path"] = asked["path"].encode()
        try:
            status, headers, body = await asyncio.wait_for(collect(served.app, asked), LISTED_WITHIN_S)
        except TimeoutError:
            return None
        if status != 200:
            return Response(body, status, headers)
        served.cards = json.loads(body)["data"]
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, whole, to the deployment that it is for."""
        body = await whole_body(receive)
        name = _model_of(scope, body)
        if name is not None:
            if name not in self._by_id:
                raise model_not_found(name, self._by_id)
            served = self._by_id[name]
        else:
            conditions = await self.conditions()
            running = [deployment for deployment, condition in conditions.items() if condition.running]
            served = self._deployments[running[0] if running else next(iter(self._deployments))]
        await served.app(scope, replay(body, receive), send)


def _model_of(scope: Scope, body: bytes) -> str | None:
    """The model that a request names, in its JSON body or its query."""
    named: Any = None
    if body:
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = None  # a replica says what is wrong with it
        named = content.get("model") if isinstance(content, dict) else None
    else:
        named = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("model", [None])[-1]
    return named if isinstance(named, str) else None


def create_router(router: Router, max_body_bytes: int) -> FastAPI:
    """Routes: `GET /v1/models`, `/v1/models/{id}`, `/health`, `/ready`, and whatever else the replicas have."""
    app = FastAPI(title="d3llm-ray", version=__version__, openapi_url=None)
    app.add_middleware(BodyLimit, limit=max_body_bytes)
    install_handlers(app)

    @app.get(MODELS)
    async def models(request: Request) -> Response:
        cards = await router.models(request)
        return cards if isinstance(cards, Response) else JSONResponse({"object": "list", "data": cards})

    @app.get(MODELS + "/{name:path}")
    async def model(name: str, request: Request) -> Response:
        cards = await router.models(request)
        if isinstance(cards, Response):
            return cards
        found = [card for card in cards if card["id"] == name]
        if not found:
            raise model_not_found(name, [card["id"] for card in cards])
        return JSONResponse(found[0])

    @app.get(HEALTH)
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get(READY)
    async def ready() -> JSONResponse:
        missing = [name for name, condition in (await router.conditions()).items() if not condition.healthy]
        if missing:
            raise ApiError(503, f"not ready: {', '.join(missing)}", code="not_ready")
        return JSONResponse({"status": "ready"})

    app.mount("/", router)
    return app


class ToReplica:
    """ASGI application: the routes of one deployment's replicas, through a call that streams their messages.

    `call(scope, body)` gives those of one answer. Its failure before the answer has begun is a 503; afterwards the
    connection is cut.
    """

    def __init__(self, call: Callable[[dict[str, Any], bytes], AsyncIterable[Message]]) -> None:
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        try:
            async for message in self._call(portable(scope), await whole_body(receive)):
                begun = True
                await send(message)
        except Exception as error:
            if begun:
                raise
            raise ApiError(503, "the replica failed; ask again", code="replica_failed", retry_after_s=1) from error


_PORTABLE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")


def portable(scope: Scope) -> dict[str, Any]:
    """What of an HTTP request's scope another process can be told."""
    told = {name: scope[name] for name in (*_PORTABLE, "client", "server") if name in scope}
    return told | {"headers": [(bytes(name), bytes(value)) for name, value in scope["headers"]]}
