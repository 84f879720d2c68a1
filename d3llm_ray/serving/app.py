"""The Ray Serve application: a deployment whose replicas hold a model, its engine and the HTTP routes, or several.

serve run serve_configs/tiny.yaml        serve deploy serve_configs/tiny.yaml        d3llm-ray serve
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application, Deployment
from starlette.types import Message

from d3llm_ray import config
from d3llm_ray.errors import InputError, require
from d3llm_ray.serving.access_log import log_through
from d3llm_ray.serving.exchange import exchange
from d3llm_ray.serving.front import TellsRoom
from d3llm_ray.serving.http import create_app
from d3llm_ray.serving.reconfiguration import UserConfig
from d3llm_ray.serving.routed import ROUTER, RouterReplica, deployment_name
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.settings import ApplicationSettings, ReplicaSettings

logger = logging.getLogger("d3llm_ray.serving")
DEPLOYMENT = "decoder"
# What a replica is given beyond its engine's slots and queue. Serve's own queue is without an end and must stay empty:
# it would refuse health checks, or let them wait. The replica's limit is the one that refuses.
SPARE_REQUESTS = 1024
HEALTH_CHECK_PERIOD_S = 1  # Serve replaces a replica after three failed checks, or one that finds its process gone
DRAIN_LOOK_S = 0.5  # between two looks at whether a replica that is to stop has finished its answers

# A redeploy starts new replicas beside the old ones and stops an old one when a new one answers, a quarter of them at a
# time: one replica is replaced without a moment without. That takes the CPUs and GPUs of one more.
_ROLLOUT: dict[str, Any] = {"max_surge_percent": 25, "rolling_update_percentage": 0.25}


class DecoderReplica:
    """One copy of the model. Requests join the running batch between two forwards; the event loop stays free."""

    _runs = False

    async def __init__(self, settings: ReplicaSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        log_through("ray.serve")
        self._service = await asyncio.to_thread(ChatService, settings)
        self._service.start()

    async def __serve_build_asgi_app__(self) -> FastAPI:
        # Built here and not at import: endpoints pickled by reference lose the signature that FastAPI needs.
        app, settings = create_app(self._service, echo_request_id=False), self._service.settings
        name = serve.get_replica_context().app_name
        app.add_middleware(
            TellsRoom,
            application=name,
            model=settings.model_id,
            room=settings.room,
            slow_reader_s=settings.slow_reader_timeout_s,
        )
        return app

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve when a replica starts with a `user_config`, and when that has changed.

        Serve ends a replica that raises: a bad one keeps a replica from starting, and changes nothing in one that runs.
        """
        try:
            self._service.reconfigure(config.build(UserConfig, user_config))
        except InputError as error:
            if not self._runs:
                raise InputError(f"user_config: {error}") from error
            logger.error("user_config is refused, the one before it stays: %s", error)

    async def check_health(self) -> None:
        """Called by Serve's controller, which replaces a replica that raises."""
        self._runs = True  # Serve begins with this after the first `reconfigure`
        problem = self._service.worker.problem()
        if problem is not None:
            raise RuntimeError(problem)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve as often as `metrics_interval_s` says; `autoscaling.CanvasDemand` reads it."""
        return self._service.worker.load().figures()

    async def __del__(self) -> None:
        service = getattr(self, "_service", None)  # absent when loading the model failed
        if service is not None:
            await asyncio.to_thread(service.stop)


class RoutedReplica(DecoderReplica):
    """One copy of one of several models: its routes are the same, and the router's process calls them."""

    async def __init__(self, settings: ReplicaSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        await super().__init__(settings)
        self._app = await self.__serve_build_asgi_app__()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """The messages of an HTTP answer. Serve closes the iterator when the client leaves."""
        async with aclosing(exchange(self._app, scope, body)) as messages:
            async for message in messages:
                yield message


def application(settings: ReplicaSettings, **options: Any) -> Application:
    """Bind the deployments to checked settings; `options` are Serve's for each model, as in a config's `deployments:`.

    One model is the deployment `decoder`. Several (`ApplicationSettings.models`) are deployments named like the models,
    behind the deployment `router`.
    """
    if not isinstance(settings, ApplicationSettings) or not settings.models:
        model = settings.replica().checked()
        return _deployment(serve.ingress()(DecoderReplica), DEPLOYMENT, model, options).bind(model)
    models = [model.checked() for model in settings.each()]
    names = [deployment_name(model.model_id) for model in models]
    differ = len({ROUTER, *names}) == len(models) + 1
    require(differ, "models", names, f"model ids that make deployment names which differ, and not {ROUTER!r}")
    handles = {
        name: _deployment(RoutedReplica, name, model, options).bind(model)
        for name, model in zip(names, models, strict=True)
    }
    router = serve.deployment(
        name=ROUTER,
        ray_actor_options={"num_cpus": 0},  # it reads bodies and hands them on
        max_ongoing_requests=sum(model.room for model in models) + SPARE_REQUESTS,
        graceful_shutdown_timeout_s=max(model.drain_timeout_s for model in models),
        graceful_shutdown_wait_loop_s=DRAIN_LOOK_S,
        **_ROLLOUT,
    )(serve.ingress()(RouterReplica))
    ids = {name: model.ids for name, model in zip(names, models, strict=True)}
    largest = {name: max(getattr(one, name) for one in models) for name in ("max_body_bytes", "slow_reader_timeout_s")}
    return router.bind(ids, handles, models[0].model_copy(update=largest))


def _deployment(kind: type[DecoderReplica], name: str, model: ReplicaSettings, options: dict[str, Any]) -> Deployment:
    gpus = float(model.device != "cpu") if model.gpus_per_actor is None else model.gpus_per_actor
    usual: dict[str, Any] = {
        "name": name,
        "ray_actor_options": {"num_cpus": model.cpus_per_actor, "num_gpus": gpus},
        "max_ongoing_requests": model.room + SPARE_REQUESTS,
        "max_queued_requests": -1,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "graceful_shutdown_timeout_s": model.drain_timeout_s,
        "graceful_shutdown_wait_loop_s": DRAIN_LOOK_S,
        # A model that cannot be loaded will not load at the twentieth attempt either.
        "max_constructor_retry_count": 3,
        **_ROLLOUT,
    }
    deployment: Deployment = serve.deployment(**(usual | options))(kind)
    return deployment


def build(args: dict[str, Any]) -> Application:
    """Application builder named by `import_path` in `serve_configs/*.yaml`; `args` are `ApplicationSettings`."""
    return application(config.build(ApplicationSettings, args))
