"""API keys: where they come from, who is let in, and what is told to whom is not. No Ray."""

from __future__ import annotations

import asyncio
import base64
import hmac
import itertools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from d3llm_ray.config import to_yaml
from d3llm_ray.errors import InputError
from d3llm_ray.serving.auth import KEYLESS_ROUTES, KEYS_VARIABLE, KeyRing, RequiresKey, given_key
from d3llm_ray.serving.http import create_app
from d3llm_ray.serving.schemas import CHAT
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.settings import ReplicaSettings, ServeSettings
from tests.serving.conftest import running_client
from tests.serving.keys import every_route, key_file
from tests.serving.life import refused_unread

KEYS = ("key-of-ann.0123456789", "key-of-bob+/=~", "key-of-eve")
BODY = {"model": "tiny-random", "messages": [{"role": "user", "content": "3 + 4"}], "max_tokens": 4}


@pytest.fixture
def guarded(service: ChatService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ChatService:
    """The service with two keys in a file and one in the environment."""
    monkeypatch.setattr(service, "keys", KeyRing(key_file(tmp_path, "# Ann's", KEYS[0], "", f"  {KEYS[1]} "), KEYS[2]))
    return service


@pytest.fixture
def app_client(guarded: ChatService, client: TestClient) -> Iterator[TestClient]:
    """A client of the same running worker through routes that ask for a key."""
    with TestClient(create_app(guarded), raise_server_exceptions=False) as guarded_client:
        yield guarded_client


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


WRONG: dict[str, dict[str, str]] = {
    "none": {},
    "empty": {"Authorization": ""},
    "empty token": {"Authorization": "Bearer "},
    "wrong": {"Authorization": "Bearer key-of-mallory"},
    "beginning": {"Authorization": f"Bearer {KEYS[0][:-1]}"},
    "too much": {"Authorization": f"Bearer {KEYS[0]}x"},
    "two keys": {"Authorization": f"Bearer {KEYS[0]} {KEYS[1]}"},
    "comment": {"Authorization": "Bearer # Ann's"},
    "no scheme": {"Authorization": KEYS[0]},
    "other scheme": {"Authorization": f"Token {KEYS[0]}"},
    "as the name": {"Authorization": basic(KEYS[0], "")},
    "not base64": {"Authorization": "Basic ***"},
    "other header": {"X-Api-Key": KEYS[0]},
    "cookie": {"Cookie": f"api_key={KEYS[0]}"},
}
RIGHT = [f"Bearer {key}" for key in KEYS] + [f"bearer  {KEYS[0]}", basic("any name", KEYS[0]), basic("", KEYS[2])]


def test_every_route_asks_for_a_key_but_two(app_client: TestClient, guarded: ChatService) -> None:
    """The routes are the application's own list: one that is added later is asked as well."""
    routes = every_route(create_app(guarded))
    known = {
        ("POST", CHAT),
        ("POST", "/v1/completions"),
        ("GET", "/v1/models/x"),
        ("GET", "/ready"),
        ("GET", "/openapi.json"),
    }
    assert known <= set(routes)
    for method, path in routes:
        for name, headers in WRONG.items():
            response = app_client.request(method, path, headers=headers)
            if path in KEYLESS_ROUTES:
                assert response.status_code in (200, 405), (method, path, name)
                continue
            assert response.status_code == 401, (method, path, name)
            assert response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                error = response.json()["error"]
                assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
                assert set(error) == {"message", "type", "param", "code"}
        for value in RIGHT:
            assert app_client.request(method, path, headers={"Authorization": value}).status_code != 401, (method, path)


def test_what_only_looks_like_an_open_route_is_not(app_client: TestClient) -> None:
    for path in (
        "/v1/models/health",
        "/health/",
        "/health/x",
        "//health",
        "/x/ready",
        "/HEALTH",
        "/health%2f..%2fdocs",
    ):
        assert app_client.get(path, follow_redirects=False).status_code == 401, path


def test_open_routes_below_an_applications_prefix() -> None:
    passed: list[str] = []

    async def routes(scope: Any, *_: Any) -> None:
        passed.append(scope["path"])

    async def send(message: Any) -> None: ...

    def ask(path: str, root_path: str) -> None:
        scope = {"type": "http", "path": path, "root_path": root_path, "headers": []}
        asyncio.run(RequiresKey(routes, KeyRing(None, "key"))(scope, None, send))  # type: ignore[arg-type]

    for path, prefix in (("/a/health", "/a"), ("/a/ready", "/a/"), ("/health", "/a"), ("/health", "")):
        ask(path, prefix)
    assert passed == ["/a/health", "/a/ready", "/health", "/health"]
    for path, prefix in (("/a/health", ""), ("/ab/health", "/a"), ("/a/v1/models", "/a"), ("/a/a/health", "/a")):
        ask(path, prefix)
    assert len(passed) == 4


def test_a_key_in_the_query_opens_nothing(app_client: TestClient) -> None:
    for name in ("api_key", "key", "authorization", "access_token", "token"):
        for value in (KEYS[0], f"Bearer {KEYS[0]}"):
            assert app_client.get("/v1/models", params={name: value}).status_code == 401


def test_two_headers_open_nothing(app_client: TestClient) -> None:
    for others in (KEYS[0], "x"):
        headers = [("Authorization", f"Bearer {others}"), ("Authorization", f"Bearer {KEYS[0]}")]
        assert app_client.get("/v1/models", headers=headers).status_code == 401


def test_a_browser_is_asked_for_the_key_and_a_script_is_not(app_client: TestClient) -> None:
    page = app_client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    bearer, login = page.headers.get_list("www-authenticate")
    assert bearer == "Bearer" and login.startswith('Basic realm="')
    assert page.headers["content-type"] == "application/json"
    fetched = app_client.get("/v1/models", headers={"Accept": "*/*"})
    assert fetched.headers.get_list("www-authenticate") == ["Bearer"]


@pytest.mark.parametrize("full", [False, True])
def test_refused_before_the_body_is_read_and_before_room_is_looked_for(
    guarded: ChatService, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """A stranger learns nothing of the load, and makes nobody read."""
    if full:
        monkeypatch.setattr(guarded.worker, "_capacity", 0)
    start = refused_unread(create_app(guarded))
    assert start["status"] == 401


def test_a_web_socket_without_a_key_is_closed_before_a_route_sees_it() -> None:
    seen: list[str] = []

    async def routes(scope: Any, *_: Any) -> None:
        seen.append(scope["type"])

    async def send(message: Any) -> None:
        seen.append(message["type"])

    guard = RequiresKey(routes, KeyRing(None, "key"))
    for headers in ([], [(b"authorization", b"Bearer key")]):
        asyncio.run(guard({"type": "websocket", "path": "/x", "headers": headers}, None, send))  # type: ignore[arg-type]
    assert seen == ["websocket.close", "websocket"]


def test_without_keys_everybody_is_answered(client: TestClient) -> None:
    for headers in WRONG.values():
        assert client.get("/v1/models", headers=headers).status_code == 200


# Comparing


def test_every_key_is_compared_in_constant_time_whatever_the_others_said(
    guarded: ChatService, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def counting(ours: bytes, given: bytes) -> bool:
        compared.append((ours, given))
        return compare(ours, given)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for key, expected in ((KEYS[0], True), (KEYS[1], True), (KEYS[2], True), ("nobody's", False), ("", False)):
        compared.clear()
        assert guarded.keys.holds(key.encode()) is expected
        assert len(compared) == len(KEYS)
        assert {len(digest) for pair in compared for digest in pair} == {32}  # not even a key's length is compared
        assert not any(key.encode() in pair for pair in compared)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (b"Bearer abc", b"abc"),
        (b"BEARER   abc  ", b"abc"),
        (b"Bearer\xff\xfe", b""),
        (b"Bearer \xff\xfe", b"\xff\xfe"),
        (b"Basic " + base64.b64encode(b"me:a:b"), b"a:b"),
        (b"Basic " + base64.b64encode(b"nocolon"), b""),
        (b"Basic \xff", b""),
        (b"Basic", b""),
        (b"Digest abc", b""),
    ],
)
def test_the_key_of_a_header(value: bytes, key: bytes) -> None:
    assert given_key({"headers": [(b"host", b"x"), (b"authorization", value)]}) == key


# Where keys come from


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, f" {KEYS[0]},{KEYS[1]}\n\n{KEYS[2]},")
    ring = KeyRing.of(ReplicaSettings())
    assert ring.asks and [ring.holds(key.encode()) for key in KEYS] == [True] * 3
    assert not ring.holds(b"")
    both = KeyRing.of(ReplicaSettings(api_keys=key_file(tmp_path, "of the file".replace(" ", "-"))))
    assert both.holds(b"of-the-file") and both.holds(KEYS[1].encode())


def test_no_keys_is_an_open_server_unless_there_must_be_some(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not KeyRing.of(ReplicaSettings()).asks
    with pytest.raises(InputError, match=f"^api_keys: none where the replica runs; accepted: .*{KEYS_VARIABLE}"):
        KeyRing.of(ReplicaSettings(api_keys_required=True))
    # Keys where the application is deployed: its replicas, which may have another environment, must have some too.
    monkeypatch.setenv(KEYS_VARIABLE, "a-key")
    settings = ReplicaSettings().checked()
    assert settings.api_keys_required
    monkeypatch.delenv(KEYS_VARIABLE)
    with pytest.raises(InputError, match="^api_keys: none where the replica runs"):
        ChatService(settings)


@pytest.mark.parametrize(("mode", "accepted"), [(0o600, True), (0o400, True), (0o440, True), (0o640, True)])
def test_who_may_read_the_file(tmp_path: Path, mode: int, accepted: bool) -> None:
    assert KeyRing(key_file(tmp_path, "a-key", mode=mode), "").holds(b"a-key")


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o620, 0o660, 0o666, 0o601])
def test_a_file_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, "a-key", mode=mode)
    with pytest.raises(InputError) as error:
        ReplicaSettings(api_keys=path).checked()
    assert str(error.value) == (
        f"api_keys: got '{path} with mode {mode:o}'; "
        "accepted: a file that only its owner (or its group) may read; chmod 600"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "accepted: a file with a key a line"),
        (b"# nothing yet\n\n", "accepted: a file with a key a line"),
        (b"good\nsecret with spaces\n", "key 2 of .*; accepted: printable ASCII without spaces$"),
        (b"secret\x00\n", "key 1 of .*; accepted: printable ASCII"),
        ("schlüssel\n".encode(), "cannot read .*: not ASCII; accepted"),
        (None, "cannot read .*: No such file or directory; accepted"),
    ],
)
def test_a_file_without_good_keys_is_refused_before_anything_starts(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(InputError, match=f"^api_keys: .*{message}") as error:
        ReplicaSettings(api_keys=path).checked()
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_key_is_revoked_and_another_added_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Looked at once a second at most; what is not a good file leaves the keys as they were, an empty one none."""
    now = itertools.count(0.0, 0.4)
    path = key_file(tmp_path, "first", "second")
    ring = KeyRing(path, "", clock=lambda: next(now))

    def after_a_while() -> tuple[bool, bool, bool]:
        for _ in range(4):
            ring.holds(b"")
        return ring.holds(b"first"), ring.holds(b"second"), ring.holds(b"third")

    def replace(*lines: str, mode: int = 0o600) -> None:
        key_file(tmp_path, *lines, mode=mode).rename(tmp_path / "new")
        os.replace(tmp_path / "new", path)

    assert after_a_while() == (True, True, False)
    replace("second", "third")
    assert after_a_while() == (False, True, True)
    replace("first", mode=0o644)
    assert after_a_while() == (False, True, True)
    assert "the keys read before stay in force: api_keys: got " in caplog.text
    replace("first")
    assert after_a_while() == (True, False, False)
    path.write_text("# nobody\n")
    assert after_a_while() == (False, False, False)
    assert ring.asks
    replace("third")
    assert after_a_while() == (False, False, True)
    path.unlink()
    assert after_a_while() == (False, False, False)
    assert ring.asks
    assert not any(key in caplog.text for key in ("first", "second", "third"))


def test_the_file_is_looked_at_once_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    ring = KeyRing(key_file(tmp_path, "a-key"), "", clock=lambda: seconds[0])
    looks: list[Any] = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **options: looks.append(args) or stat(*args, **options))
    for seconds[0] in (0.5, 0.9, 1.1, 1.5, 2.0, 2.2):
        ring.holds(b"a-key")
    assert len(looks) == 2


# Where keys are not


def test_keys_are_nowhere_to_be_read(
    app_client: TestClient,
    guarded: ChatService,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither in logs nor in answers nor in settings, whatever goes wrong."""
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    for key in (*KEYS, "key-of-mallory"):
        for headers in ({"Authorization": f"Bearer {key}"}, {"Authorization": basic(key, key)}):
            for method, path in every_route(create_app(guarded)):
                response = app_client.request(method, path, headers=headers, params={"api_key": key})
                said += [response.text, str(response.headers)]
            said.append(app_client.post(CHAT, headers=headers, json=BODY | {"n": 10**9}).text)
    monkeypatch.setattr(guarded, "card", lambda: 1 / 0)
    assert app_client.get("/v1/models", headers={"Authorization": f"Bearer {KEYS[0]}"}).status_code == 500
    monkeypatch.setenv(KEYS_VARIABLE, KEYS[2])
    settings = ServeSettings(api_keys=key_file(tmp_path, *KEYS))
    said += [to_yaml(settings), repr(settings), repr(settings.replica().checked()), repr(vars(guarded.keys))]
    # What the client of this test logs is its own affair.
    logged = "\n".join(caplog.handler.format(one) for one in caplog.records if not one.name.startswith("http"))
    assert "ZeroDivisionError" in logged and '"path": "/v1/models"' in logged
    said.append(logged)
    for text in said:
        assert not any(key in text for key in (*KEYS, "key-of-mallory"))
        assert not any(basic(key, key).split()[1] in text for key in KEYS)
    assert str(tmp_path / "keys") in to_yaml(settings)


def test_the_openai_package_comes_in_with_its_key(make_service: Any, tmp_path: Path) -> None:
    service = make_service(api_keys=key_file(tmp_path, KEYS[0]))
    with running_client(service) as client:
        headers = {"Authorization": f"Bearer {KEYS[0]}"}
        assert client.post(CHAT, json=BODY, headers=headers).status_code == 200
        stream = client.post(CHAT, json=BODY | {"stream": True}, headers=headers)
        assert stream.text.endswith("data: [DONE]\n\n")
        assert client.post(CHAT, json=BODY).status_code == 401
        assert json.loads(client.get("/health").text) == {"status": "ok"}


# CORS


ORIGIN = "https://chat.example.com"


def cors_client(service: ChatService, monkeypatch: pytest.MonkeyPatch, *origins: str) -> TestClient:
    settings = ReplicaSettings(**{**service.settings.model_dump(), "cors_origins": list(origins)})
    monkeypatch.setattr(service, "settings", settings)
    return TestClient(create_app(service), raise_server_exceptions=False)


def preflight(client: TestClient, origin: str, method: str = "POST") -> Any:
    headers = {"Origin": origin, "Access-Control-Request-Method": method}
    headers["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang"
    return client.options(CHAT, headers=headers)


def test_cors_is_off_unless_set(client: TestClient, app_client: TestClient) -> None:
    assert preflight(client, ORIGIN).status_code == 405
    assert preflight(app_client, ORIGIN).status_code == 401
    for response in (client.get("/v1/models", headers={"Origin": ORIGIN}), preflight(client, ORIGIN)):
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(("origins", "told"), [((ORIGIN, "http://localhost:3000"), ORIGIN), (("*",), "*")])
def test_pages_of_the_origins_named_may_ask_with_a_key(
    guarded: ChatService, monkeypatch: pytest.MonkeyPatch, origins: tuple[str, ...], told: str
) -> None:
    client = cors_client(guarded, monkeypatch, *origins)
    asked = preflight(client, ORIGIN)
    assert asked.status_code == 200  # without a key, which no browser would send
    assert asked.headers["access-control-allow-origin"] == told
    assert asked.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-lang"
    right = {"Origin": ORIGIN, "Authorization": f"Bearer {KEYS[0]}"}
    answers = [client.get("/v1/models", headers=right), client.get("/v1/models", headers={"Origin": ORIGIN})]
    answers.append(client.post(CHAT, headers=right, json=BODY | {"n": -1}))
    monkeypatch.setattr(guarded, "card", lambda: 1 / 0)
    answers.append(client.get("/v1/models", headers=right))
    assert [answer.status_code for answer in answers] == [200, 401, 400, 500]
    for answer in answers:  # also a refusal can be read by the page
        assert answer.headers["access-control-allow-origin"] == told
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
    assert client.options("/v1/models").status_code == 401  # not a preflight


def test_pages_of_other_origins_may_not(guarded: ChatService, monkeypatch: pytest.MonkeyPatch) -> None:
    client = cors_client(guarded, monkeypatch, ORIGIN)
    for origin in ("https://evil.example.com", f"{ORIGIN}.evil.com", "http://chat.example.com", "null"):
        assert preflight(client, origin).status_code == 400
        headers = {"Origin": origin, "Authorization": f"Bearer {KEYS[0]}"}
        assert "access-control-allow-origin" not in client.get("/v1/models", headers=headers).headers
    assert preflight(client, ORIGIN, "DELETE").status_code == 400


@pytest.mark.parametrize(
    "origin", ["chat.example.com", f"{ORIGIN}/", f"{ORIGIN}/chat", "https://*", "null", "", "ftp://x"]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="cors_origins"):
        ReplicaSettings(cors_origins=[origin])
