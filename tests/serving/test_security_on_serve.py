"""Keys, ids, limits and logs through Ray Serve's proxy, as they are without it."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
import pytest

from d3llm_ray.serving.heads import MAX_HEAD_BYTES
from d3llm_ray.serving.schemas import CHAT
from d3llm_ray.serving.server import serve_in_background
from d3llm_ray.serving.settings import ServeSettings
from tests.serving.keys import key_file
from tests.serving.test_limits import IDLE, accept_seconds, send_raw

pytestmark = pytest.mark.slow  # a Serve of its own
KEY = "key-of-ann.0123456789"
PROMPT = "Tom has 5 apples and buys 7 more. The launch code is 5 7 9"
BODY = {"model": "tiny-random", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}
RIGHT = {"Authorization": f"Bearer {KEY}"}
FRESH = re.compile(r"[0-9a-f]{32}")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return key_file(tmp_path_factory.mktemp("secrets"), KEY)


@pytest.fixture(scope="module")
def url(ray_cluster: None, tiny_checkpoint: Path, keys: Path) -> Iterator[str]:
    with serve_in_background(ServeSettings(model=str(tiny_checkpoint), port=0, max_batch_size=2, api_keys=keys)) as url:
        yield url


@pytest.fixture(scope="module")
def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return str(parts.hostname), int(parts.port or 0)


def logs() -> str:
    """All that Serve's processes have logged in this session."""
    from ray._private.worker import _global_node

    assert _global_node is not None
    folder = Path(_global_node.get_session_dir_path()) / "logs"
    files = [*folder.glob("serve/*"), *folder.glob("worker-*")]
    return "\n".join(path.read_text(errors="replace") for path in files if path.is_file())


def test_a_key_is_asked_for_and_the_openai_package_brings_it(url: str) -> None:
    assert httpx.get(f"{url}/health").status_code == 200
    for path in ("/v1/models", "/openapi.json", "/nothing", "/"):
        refused = httpx.get(f"{url}{path}")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert httpx.get(f"{url}{path}", params={"api_key": KEY}).status_code == 401
    login = httpx.get(f"{url}/", headers={"Accept": "text/html"}).headers.get_list("www-authenticate")
    assert len(login) == 2
    assert httpx.get(f"{url}/v1/models", auth=("anybody", KEY)).status_code == 200
    with pytest.raises(openai.AuthenticationError) as wrong:
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
    assert wrong.value.code == "invalid_api_key"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    assert client.chat.completions.create(**BODY).usage.completion_tokens  # type: ignore[call-overload]


def test_an_answer_has_one_id_which_is_sane(url: str) -> None:
    for headers in (RIGHT, {}):  # 200 and 401
        mine = httpx.get(f"{url}/v1/models", headers=headers | {"X-Request-Id": "mine-1"})
        assert mine.headers.get_list("x-request-id") == ["mine-1"]
        for sent in ("a b", "x" * 500, '{"a": 1}'):
            (told,) = httpx.get(f"{url}/v1/models", headers=headers | {"X-Request-Id": sent}).headers.get_list(
                "x-request-id"
            )
            assert FRESH.fullmatch(told)


def test_a_line_of_each_request_and_neither_keys_nor_prompts_in_any_log(url: str) -> None:
    sent = {
        "json-1": httpx.post(f"{url}{CHAT}", json=BODY, headers=RIGHT | {"X-Request-Id": "json-1"}),
        "stream-1": httpx.post(
            f"{url}{CHAT}", json=BODY | {"stream": True}, headers=RIGHT | {"X-Request-Id": "stream-1"}
        ),
        "bad-1": httpx.post(f"{url}{CHAT}", json=BODY | {"n": -1}, headers=RIGHT | {"X-Request-Id": "bad-1"}),
        "no-1": httpx.post(f"{url}{CHAT}", json=BODY, headers={"X-Request-Id": "no-1"}, params={"key": KEY}),
    }
    found: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + 10
    while len(found) < len(sent) and time.monotonic() < deadline:
        for text in re.findall(r"\{\"time\".*\}$", logs(), re.MULTILINE):
            line = json.loads(text)
            if line["request_id"] in sent:
                found[line["request_id"]] = line
        time.sleep(0.2)
    assert {name: line["status"] for name, line in found.items()} == {
        "json-1": 200,
        "stream-1": 200,
        "bad-1": 400,
        "no-1": 401,
    }
    usage = sent["json-1"].json()["usage"]
    for name in ("json-1", "stream-1"):
        assert (found[name]["prompt_tokens"], found[name]["forwards"]) == (usage["prompt_tokens"], usage["forwards"])
    assert found["no-1"]["error"] == "invalid_api_key"
    text = logs()
    answer = sent["json-1"].json()["choices"][0]["message"]["content"]
    assert "json-1" in text and not any(secret in text for secret in (KEY, "launch code", answer))


def test_an_endless_head_is_cut_off_by_the_proxy(address: tuple[str, int]) -> None:
    endless = [b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Endless: ", *[b"x" * 8192] * (64 * MAX_HEAD_BYTES // 8192)]
    answer = send_raw(address, *endless)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")


def test_large_heads_and_bodies_are_refused_as_openai_would(url: str) -> None:
    for extra in ({f"X-Header-{n}": "x" for n in range(101)}, {"X-Large": "x" * (MAX_HEAD_BYTES - 100)}):
        refused = httpx.get(f"{url}/v1/models", headers=RIGHT | extra)
        assert (refused.status_code, refused.json()["error"]["code"]) == (431, "headers_too_large")
        assert len(refused.headers.get_list("x-request-id")) == 1
    large = httpx.post(f"{url}{CHAT}", headers=RIGHT, content=b"x" * 1_100_000)
    assert (large.status_code, large.json()["error"]["type"]) == (413, "invalid_request_error")


def test_a_thousand_idle_connections_to_the_proxy_change_nothing(address: tuple[str, int]) -> None:
    alone = accept_seconds(address)
    with ExitStack() as idle:
        for _ in range(IDLE):
            idle.enter_context(socket.create_connection(address, timeout=10))
        beside = accept_seconds(address)
    print(f"a new connection's answer: {alone * 1000:.2f} ms alone, {beside * 1000:.2f} ms beside {IDLE} idle ones")
    assert beside < 2 * alone + 0.02


def test_a_key_is_revoked_while_the_server_runs(url: str, keys: Path) -> None:
    """The last of this file."""
    keys.write_text("another-key\n")
    deadline = time.monotonic() + 10
    while httpx.get(f"{url}/v1/models", headers=RIGHT).status_code == 200 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert httpx.get(f"{url}/v1/models", headers=RIGHT).status_code == 401
    assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer another-key"}).status_code == 200
