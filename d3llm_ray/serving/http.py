"""The HTTP routes over one `ChatService`, as a FastAPI application that knows nothing of Ray."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI

from d3llm_ray import __version__
from d3llm_ray.serving.connections import EndsWithClient
from d3llm_ray.serving.errors import install_handlers
from d3llm_ray.serving.guards import guard
from d3llm_ray.serving.limits import BodyLimit, RefusesWhenFull
from d3llm_ray.serving.openapi import document
from d3llm_ray.serving.playground import playground
from d3llm_ray.serving.routes import about, chat, completions, text
from d3llm_ray.serving.service import ChatService


def create_app(service: ChatService, *, echo_request_id: bool = True) -> FastAPI:
    """An application with the routes of every module in `routes/`.

    `echo_request_id`: whether answers tell the request's id; behind Ray Serve its proxy adds that.
    """
    # Without FastAPI's pages of documentation: their scripts come from another host.
    app = FastAPI(title="d3llm-ray", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, limit=service.settings.max_body_bytes)
    app.add_middleware(RefusesWhenFull, service=service)
    app.add_middleware(EndsWithClient)  # the outer one
    guard(app, service.settings, service.keys, echo_request_id=echo_request_id)
    install_handlers(app)
    app.include_router(playground())
    for group in (chat, completions, text, about):
        app.include_router(group.router(service))
    app.openapi = partial(document, app, service)  # type: ignore[method-assign]
    return app
