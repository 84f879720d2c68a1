"""What every request passes before a route: its id and log line, CORS, the limit of its head, its key."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from d3llm_ray.serving.access_log import RequestLog
from d3llm_ray.serving.auth import KeyRing, RequiresKey
from d3llm_ray.serving.errors import AnswersErrors
from d3llm_ray.serving.heads import HeadLimit
from d3llm_ray.serving.settings import ReplicaSettings


def guard(app: FastAPI, settings: ReplicaSettings, keys: KeyRing, *, echo_request_id: bool) -> None:
    """Put the guards before `app` and the middlewares that it has: nothing of a body is read before them."""
    if keys.asks:
        app.add_middleware(RequiresKey, keys=keys)
    app.add_middleware(HeadLimit)
    app.add_middleware(AnswersErrors)
    if settings.cors_origins:
        # Before the keys: a browser's preflight brings none. No credentials: a page sends its key itself.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RequestLog, log=settings.log_requests, echo=echo_request_id)
