"""The Ray Serve application: one deployment whose replicas hold a model, its engine and the HTTP routes.

serve run serve_configs/tiny.yaml        serve deploy serve_configs/tiny.yaml        d3llm-ray serve
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from d3llm_ray import config
from d3llm_ray.serving.access_log import log_through
from d3llm_ray.serving.front import TellsRoom
from d3llm_ray.serving.http import create_app
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.settings import ReplicaSettings

DEPLOYMENT = "decoder"
# What a replica is given beyond its engine's slots and queue. Serve's own queue is without an end and must stay empty:
# it would refuse health checks, or let them wait. The replica's limit is the one that refuses.
SPARE_REQUESTS = 1024


class DecoderReplica:
    """One copy of the model. Requests join the running batch between two forwards; the event loop stays free."""

    async def __init__(self, settings: ReplicaSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        log_through("ray.serve")
        self._service = await asyncio.to_thread(ChatService, settings)
        self._service.start()

    async def __serve_build_asgi_app__(self) -> FastAPI:
        # Built here and not at import: endpoints pickled by reference lose the signature that FastAPI needs.
        app, settings = create_app(self._service, echo_request_id=False), self._service.settings
        name = serve.get_replica_context().app_name
        app.add_middleware(TellsRoom, application=name, model=settings.model_id, room=settings.room)
        return app

    async def check_health(self) -> None:
        """Called by Serve's controller, which replaces a replica that raises."""
        problem = self._service.worker.problem()
        if problem is not None:
            raise RuntimeError(problem)

    async def __del__(self) -> None:
        service = getattr(self, "_service", None)  # absent when loading the model failed
        if service is not None:
            await asyncio.to_thread(service.stop)


def application(settings: ReplicaSettings, **options: Any) -> Application:
    """Bind the deployment to checked settings; `options` are Serve's, as in a config's `deployments:`."""
    settings = settings.checked()
    gpus = float(settings.device != "cpu") if settings.gpus_per_actor is None else settings.gpus_per_actor
    deployment = serve.deployment(
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": settings.cpus_per_actor, "num_gpus": gpus},
        max_ongoing_requests=settings.room + SPARE_REQUESTS,
        max_queued_requests=-1,
        health_check_period_s=2,
        # A model that cannot be loaded will not load at the twentieth attempt either.
        max_constructor_retry_count=3,
        **options,
    )(serve.ingress()(DecoderReplica))
    return deployment.bind(settings)


def build(args: dict[str, Any]) -> Application:
    """Application builder named by `import_path` in `serve_configs/*.yaml`; `args` are `ReplicaSettings`."""
    return application(config.build(ReplicaSettings, args))
