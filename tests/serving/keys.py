"""API keys for tests, and what is asked of every route."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.routing import Route


def key_file(folder: Path, *lines: str, mode: int = 0o600) -> Path:
    """A file of keys in `folder`, as `api_keys` names it."""
    path = folder / "keys"
    path.write_text("\n".join(lines) + "\n")
    path.chmod(mode)
    return path


def every_route(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of what `app` has routes for, with a word for each parameter, and of what it has none for."""
    routes = [route for route in app.routes if isinstance(route, Route)]
    assert len(routes) == len(app.routes), "a kind of route that this does not know"
    found = {
        (method, route.path.replace("{name:path}", "x"))
        for route in routes
        for method in route.methods or {"GET", "POST"}
    }
    assert not any("{" in path for _, path in found)
    return sorted(found | {("GET", "/"), ("POST", "/nothing"), ("OPTIONS", "/v1/models"), ("DELETE", "/v1/models")})
