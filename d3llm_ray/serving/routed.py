"""The router as a Ray Serve deployment: `router.Router` over handles of the models' deployments. No torch."""

from __future__ import annotations

import re
from collections.abc import AsyncIterable
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve._private.common import ReplicaState
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import ASGIApp, Message

from d3llm_ray.serving.access_log import log_through
from d3llm_ray.serving.auth import KeyRing
from d3llm_ray.serving.front import Front, TellsRoom, running_replicas
from d3llm_ray.serving.guards import guard
from d3llm_ray.serving.router import Condition, Router, Served, ToReplica, create_router
from d3llm_ray.serving.settings import ReplicaSettings

ROUTER = "router"
_ILL = ("UNHEALTHY", "DEPLOY_FAILED")  # of Serve's states of a deployment


def deployment_name(model_id: str) -> str:
    """The name of a model's deployment: its id, with `-` for what Serve may not take in a name."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", model_id)


class RouterReplica:
    """One process that reads which model a request is for. `ids` and `handles` are by deployment.

    `guarded` has its keys, its CORS origins and whether it logs: the first model's; and the largest limits of all.
    """

    def __init__(
        self, ids: dict[str, tuple[str, ...]], handles: dict[str, DeploymentHandle[Any]], guarded: ReplicaSettings
    ) -> None:
        log_through("ray.serve")
        self._ids, self._handles, self._guarded = ids, handles, guarded
        self._keys = KeyRing.of(guarded)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        application = serve.get_replica_context().app_name
        served = {name: Served(ids, self._way_to(name)) for name, ids in self._ids.items()}
        app = create_router(Router(served, partial(conditions_of, application)), self._guarded.max_body_bytes)
        guard(app, self._guarded, self._keys, echo_request_id=False)
        # Whose room is taken is not known before a body is read: the front before Serve's proxy refuses nothing.
        limit_s = self._guarded.slow_reader_timeout_s
        app.add_middleware(TellsRoom, application=application, model=ROUTER, room=None, slow_reader_s=limit_s)
        return app

    def _way_to(self, name: str) -> ASGIApp:
        """A deployment's routes behind a front of its own: that of Serve's proxy knows of no model."""
        handle = self._handles[name].options(method_name="answer", stream=True)

        def call(scope: dict[str, Any], body: bytes) -> AsyncIterable[Message]:
            messages = handle.remote(scope, body)
            assert isinstance(messages, DeploymentResponseGenerator)
            return messages

        return Front(ToReplica(call), partial(running_replicas, deployment=name))


def conditions_of(application: str) -> dict[str, Condition]:
    """How the deployments of an application are, as Serve's controller says."""
    told = serve.status().applications[application].deployments
    return {
        name: Condition(one.replica_states.get(ReplicaState.RUNNING, 0), one.status not in _ILL)
        for name, one in told.items()
    }
