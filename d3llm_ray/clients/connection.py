"""The server that a verb talks to: one behind a URL, with its key, or a model served in this process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx2

from d3llm_ray.clients.settings import OF_MODEL, ClientSettings
from d3llm_ray.config import build
from d3llm_ray.errors import InputError, WorkError, one_line, require
from d3llm_ray.serving.client_key import KEY_VARIABLES, client_key
from d3llm_ray.serving.settings import ReplicaSettings

ANSWERS_WITHIN_S = 30.0  # the list of models, for which no forward is waited for


@dataclass(frozen=True)
class Server:
    """Where requests go. `models` are the ids that it serves."""

    url: str  # without /v1
    key: str | None = field(repr=False)
    models: tuple[str, ...]
    local: bool  # in this process

    @property
    def http_options(self) -> dict[str, Any]:
        """How httpx reaches it: this process never through the environment's proxy."""
        return {"headers": _authorization(self.key), "trust_env": not self.local}


def check_server(settings: ClientSettings, also: tuple[str, ...] = ()) -> None:
    """Raise `InputError` for settings that do not go together or name what is not there; nothing starts.

    `also`: settings of the model that mean something beside a `url`.
    """
    if settings.url is None:
        require(settings.api_key_file is None, "api_key_file", str(settings.api_key_file), "only with url")
        build(ReplicaSettings, settings.of_model()).checked()
        return
    base_url(settings.url)
    client_key(settings.api_key_file)
    defaults = type(settings).model_fields
    for name in set(OF_MODEL) - set(also):
        value = getattr(settings, name)
        usual = defaults[name].get_default()
        require(value == usual, name, value, "nothing beside url, whose server has settings of its own")


@contextmanager
def connected(settings: ClientSettings, concurrency: int) -> Iterator[Server]:
    """The server while the block runs; one of this process takes on `concurrency` requests at once.

    Raises `WorkError` when nothing answers at the URL, `InputError` when it wants another key.
    """
    if settings.url is not None:
        url, key = base_url(settings.url), client_key(settings.api_key_file)
        yield Server(url, key, _models(url, key, local=False), local=False)
        return
    from d3llm_ray.serving.auth import KEYS_VARIABLE
    from d3llm_ray.serving.local import serve_locally

    # Who asks is who serves: nothing is to be guarded, and how long to wait is the client's affair.
    own = {"max_queue": concurrency, "max_body_bytes": 2**31, "request_timeout_s": None, "log_requests": False}
    keys = re.split(r"[,\s]+", os.environ.get(KEYS_VARIABLE, "").strip())
    with serve_locally(build(ReplicaSettings, settings.of_model() | own)) as url:
        yield Server(url, keys[0] or None, _models(url, keys[0] or None, local=True), local=True)


def base_url(url: str) -> str:
    """A server's URL without `/v1`; `InputError` for what is no URL of one."""
    parts = urlsplit(url)
    accepted = "http://HOST:PORT or https://HOST; a key belongs into api_key_file"
    require("@" not in parts.netloc, "url", f"{parts.scheme}://...@{parts.hostname}", accepted)
    plain = not (parts.query or parts.fragment)
    require(parts.scheme in ("http", "https") and bool(parts.hostname) and plain, "url", url, accepted)
    return url.rstrip("/").removesuffix("/v1")


def _authorization(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def _models(url: str, key: str | None, local: bool) -> tuple[str, ...]:
    try:
        response = httpx2.get(
            f"{url}/v1/models", headers=_authorization(key), trust_env=not local, timeout=ANSWERS_WITHIN_S
        )
    except httpx2.HTTPError as error:
        raise WorkError(f"url: {url} does not answer: {one_line(error) or type(error).__name__}") from error
    if response.status_code in (401, 403):
        raise InputError(
            f"api_key_file: {url} refuses {'this key' if key else 'requests without a key'}; accepted: a key that "
            f"the server knows, in this file or in {' or '.join(KEY_VARIABLES)}"
        )
    if response.status_code >= 500:
        raise WorkError(f"url: {url} answers {response.status_code}")
    try:
        return tuple(str(card["id"]) for card in response.json()["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"url: {url} is no server of OpenAI's API: /v1/models lists no models") from error
