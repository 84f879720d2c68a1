"""API keys: where they come from, how one is compared, and the guard before every route but two.

Keys are kept as digests. What a request sends is compared with each of them in constant time, so that neither the time
of a refusal nor its text tells how close a guess was.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from d3llm_ray.errors import InputError, require
from d3llm_ray.paths import not_uploaded
from d3llm_ray.serving.errors import ApiError, to_api_error
from d3llm_ray.serving.schemas import HEALTH, READY
from d3llm_ray.serving.settings import ReplicaSettings

logger = logging.getLogger("d3llm_ray.serving")
KEYS_VARIABLE = "D3LLM_RAY_API_KEYS"
KEYLESS_ROUTES = (HEALTH, READY)  # for load balancers; they tell nothing
LOOK_AGAIN_S = 1.0  # how long a key that was taken out of its file is still good
_FOR_OTHERS = 0o027  # nothing for others; the group may read, as it does where a secret is mounted into a pod
_A_KEY = re.compile(r"[!-~]+")  # what a header can carry


class KeyRing:
    """The keys that open a server: those of a file, which is read again when it changes, and of the environment."""

    def __init__(self, file: Path | None, variable: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`InputError` for a file that cannot be read, that others may read, or that holds no key."""
        self._file, self._clock = file, clock
        self._of_environment = _digests(_keys_of(re.split(r"[,\n]", variable), KEYS_VARIABLE))
        self._of_file: tuple[bytes, ...] = ()
        self._looked, self._seen = clock(), _signature(file)
        if file is not None:
            self._of_file = _digests(read_key_file(file))
            require(bool(self._of_file), "api_keys", str(file), "a file with a key a line")

    @classmethod
    def of(cls, settings: ReplicaSettings) -> KeyRing:
        """The keys of a replica, in its own process. `InputError` where there are none and there must be."""
        ring = cls(settings.api_keys, os.environ.get(KEYS_VARIABLE, ""))
        if settings.api_keys_required and not ring.asks:
            accepted = f"a file of keys (api_keys), or {KEYS_VARIABLE} in the environment of the replicas"
            raise InputError(f"api_keys: none where the replica runs; accepted: {accepted}")
        return ring

    @property
    def asks(self) -> bool:
        """Whether requests need a key. A file that is emptied later closes the server; it does not open it."""
        return self._file is not None or bool(self._of_environment)

    def holds(self, key: bytes) -> bool:
        """Whether `key` is one of the keys. Compares with each of them, whatever the others said."""
        self._look_again()
        given = hashlib.sha256(key).digest()
        found = False
        for digest in (*self._of_file, *self._of_environment):
            found |= hmac.compare_digest(digest, given)
        return found

    def _look_again(self) -> None:
        if self._file is None or self._clock() - self._looked < LOOK_AGAIN_S:
            return
        self._looked, signature = self._clock(), _signature(self._file)
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._of_file = _digests(read_key_file(self._file)) if signature else ()
        except InputError as error:
            logger.error("the keys read before stay in force: %s", error)
            return
        logger.warning("%s has changed: %d keys", self._file, len(self._of_file))


def read_key_file(path: Path) -> list[str]:
    """Keys, one a line; lines that begin with `#` and empty ones are none. `InputError` says what is wrong."""
    try:
        with path.open(encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            accepted = "a file that only its owner (or its group) may read; chmod 600"
            require(not mode & _FOR_OTHERS, "api_keys", f"{path} with mode {mode:o}", accepted)
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not ASCII"
        raise InputError(
            f"api_keys: cannot read {str(path)!r}: {reason}; accepted: a file with a key a line{not_uploaded(path)}"
        ) from error
    return _keys_of((line for line in lines if not line.lstrip().startswith("#")), str(path))


def _keys_of(texts: Iterable[str], where: str) -> list[str]:
    keys = [text.strip() for text in texts if text.strip()]
    for number, key in enumerate(keys, 1):
        if not _A_KEY.fullmatch(key):  # the key itself is not shown
            raise InputError(f"api_keys: key {number} of {where}; accepted: printable ASCII without spaces")
    return keys


def _digests(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(key.encode("ascii")).digest() for key in keys)


def _signature(file: Path | None) -> tuple[int, ...]:
    """Changes when the file does; empty where there is none."""
    try:
        stat = os.stat(file) if file is not None else None
    except OSError:
        return ()
    return () if stat is None else (stat.st_mtime_ns, stat.st_ino, stat.st_size, stat.st_mode)


class RequiresKey:
    """ASGI middleware: a request without one of the keys gets 401, before its body is read."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _route_path(scope) in KEYLESS_ROUTES or self._keys.holds(given_key(scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _unauthorized(scope)(scope, receive, send)


def _route_path(scope: Scope) -> str:
    """The path below the application's prefix, which is exact: `/v1/models/health` is not `/health`."""
    path: str = scope["path"]
    prefix = scope.get("root_path", "").rstrip("/")
    return path[len(prefix) :] if prefix and path.startswith(f"{prefix}/") else path


def given_key(scope: Scope) -> bytes:
    """The key that a request sends: a Bearer token, or the password of HTTP Basic, which browsers ask for.

    Empty where there is none, or where two headers say different things. A query string is not looked at: those end
    in logs and histories.
    """
    sent = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(sent) != 1:
        return b""
    scheme, _, value = sent[0].strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return bytes(value.strip())
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _unauthorized(scope: Scope) -> Response:
    message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
    response = to_api_error(ApiError(401, message, code="invalid_api_key")).response()
    response.headers["WWW-Authenticate"] = "Bearer"
    # A browser that opens a page asks for a name and a password then; a script's request must not make it ask.
    if "text/html" in Headers(scope=scope).get("accept", ""):
        response.headers.append("WWW-Authenticate", 'Basic realm="d3llm-ray: any name, an API key as password"')
    return response
