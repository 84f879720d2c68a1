"""A served random model without Ray: the service, and a client of its HTTP application."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from d3llm_ray.serving import server
from d3llm_ray.serving.http import create_app
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.settings import ReplicaSettings, ServeSettings


@contextmanager
def running_client(service: ChatService) -> Iterator[TestClient]:
    """An HTTP client whose event loop also runs the service's worker."""
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        assert client.portal is not None
        client.portal.call(service.start)
        yield client
        service.stop()


@pytest.fixture(scope="session")
def service(tiny_checkpoint: Path) -> ChatService:
    return ChatService(
        ReplicaSettings(model=str(tiny_checkpoint), max_batch_size=4, max_tokens=32, max_tokens_limit=128)
    )


@pytest.fixture(scope="session")
def client(service: ChatService) -> Iterator[TestClient]:
    with running_client(service) as client:
        yield client


@pytest.fixture
def make_service(tiny_checkpoint: Path) -> Any:
    """Build a service of its own for a test that breaks it."""

    def make(**settings: Any) -> ChatService:
        return ChatService(ReplicaSettings(model=str(tiny_checkpoint), **settings))

    return make


@pytest.fixture
def client_of() -> Any:
    """Context manager: an HTTP client of a service that a test has made itself."""
    return running_client


@pytest.fixture(scope="module")
def serve_url(ray_cluster: None) -> Iterator[str]:
    """Serve with our front and no application; the address of its proxy."""
    with server._http(ServeSettings(port=0)) as port:
        yield f"http://127.0.0.1:{port}"
