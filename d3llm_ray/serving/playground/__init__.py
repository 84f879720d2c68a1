"""The playground: one static page and what it loads, served as they lie beside this module.

The page asks the routes of the server that it came from, by relative addresses, and no other host: it works behind a
route prefix and behind a proxy's login, and a browser holds it to that by `SECURITY_HEADERS`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from d3llm_ray.serving.errors import ApiError

PAGE = "index.html"
FOLDER = "playground"  # of everything but the page itself, below the page's own address
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, and asked for again: an upgrade shows at once; without one it costs a 304
}


@dataclass(frozen=True)
class Asset:
    """A file of the page with its headers."""

    content: bytes
    headers: dict[str, str]

    def answer(self, known: str) -> Response:
        """The file, or 304 where `known`, the request's `If-None-Match`, has its tag."""
        tags = {tag.strip().removeprefix("W/") for tag in known.split(",")}  # a compressing proxy weakens them
        if self.headers["ETag"] in tags:
            return Response(status_code=304, headers=self.headers)
        return Response(self.content, headers=self.headers)


def _read(path: Path) -> Asset:
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return Asset(content, {**SECURITY_HEADERS, "Content-Type": _TYPES[path.suffix], "ETag": tag})


def playground() -> APIRouter:
    """`GET /`, the page, and `GET /playground/{name}`, what it loads. The files are read now, once."""
    folder = Path(__file__).parent
    assets = {path.name: _read(path) for path in sorted(folder.iterdir()) if path.suffix in _TYPES}
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page(request: Request) -> Response:
        return assets[PAGE].answer(request.headers.get("if-none-match", ""))

    @router.get(f"/{FOLDER}/{{name}}")
    async def asset(name: str, request: Request) -> Response:
        if name not in assets or name == PAGE:  # its addresses are relative to the other place
            raise ApiError(404, f"{FOLDER}: no file {name[:80]!r}", code="not_found")
        return assets[name].answer(request.headers.get("if-none-match", ""))

    return router
