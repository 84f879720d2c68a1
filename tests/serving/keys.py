"""API keys for tests, and what is asked of every route."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastapi import FastAPI
from starlette.routing import BaseRoute, Route


def key_file(folder: Path, *lines: str, mode: int = 0o600) -> Path:
    """A file of keys in `folder`, as `api_keys` names it."""
    path = folder / "keys"
    path.write_text("\n".join(lines) + "\n")
    path.chmod(mode)
    return path


def every_route(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of what `app` has routes for, with a word for each parameter, and of what it has none for."""
    found = {
        (method, re.sub(r"\{[^}]*\}", "x", route.path))
        for route in _leaves(app.routes)
        for method in route.methods or ()
    }
    return sorted(found | {("GET", "/"), ("POST", "/nothing"), ("OPTIONS", "/v1/models"), ("DELETE", "/v1/models")})


def _leaves(routes: Sequence[BaseRoute]) -> Iterator[Route]:
    for route in routes:
        included = getattr(route, "original_router", None)  # FastAPI's own kind of route for a router
        if included is not None:
            yield from _leaves(included.routes)
        else:
            assert isinstance(route, Route), f"a kind of route that this does not know: {route!r}"
            yield route
