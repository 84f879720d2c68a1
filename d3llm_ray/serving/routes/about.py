"""What is served and how it fares: models, version, liveness, readiness."""

from __future__ import annotations

from fastapi import APIRouter

from d3llm_ray import __version__
from d3llm_ray.serving.errors import ApiError
from d3llm_ray.serving.openapi import errors
from d3llm_ray.serving.replies import ModelCard, ModelList, Status, Version
from d3llm_ray.serving.schemas import HEALTH, READY
from d3llm_ray.serving.service import ChatService


def router(service: ChatService) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models", responses=errors())
    async def models() -> ModelList:
        """The models that are served."""
        return ModelList(data=service.cards())

    @routes.get("/v1/models/{name:path}", responses=errors(404))
    async def model(name: str) -> ModelCard:
        """A model, its decoder, and the decoders that a request may name."""
        service.check_model(name)
        return next(card for card in service.cards() if card.id == name)

    @routes.get("/version", responses=errors())
    async def version() -> Version:
        """The version of d3llm-ray."""
        return Version(version=__version__)

    @routes.get(HEALTH, responses=errors(503))
    async def health() -> Status:
        """Liveness: answered while a forward runs, and under any load."""
        problem = service.worker.problem()
        if problem is not None:
            raise ApiError(503, problem, code="unhealthy")
        return Status(status="ok")

    @routes.get(READY, responses=errors(503))
    async def ready() -> Status:
        """Readiness: 200 while this replica takes requests, a full queue aside."""
        reason = service.unready()
        if reason is not None:
            raise ApiError(503, reason, code="not_ready")
        return Status(status="ready")

    return routes
