"""Ray's own token authentication on a head of its own: the dashboard and its APIs ask for the token."""

from __future__ import annotations

import secrets
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.cluster import Node, free_port

PATIENCE_S = 180.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def status(url: str, token: str | None = None) -> int:
    """The answer's; 0 where there is none."""
    request = urllib.request.Request(url, headers={} if token is None else {"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, str]]:
    """The dashboard's URL and the cluster's token."""
    port, token = free_port(), secrets.token_hex(32)
    options = ["--head", "--port=0", f"--ray-client-server-port={free_port()}"]
    options += ["--include-dashboard=true", f"--dashboard-port={port}"]
    with tempfile.TemporaryDirectory(prefix="d3-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "token"
        path.write_text(token)
        patch.setenv("HOME", folder)  # a developer's own token is not looked for
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
        node = Node(Path(folder) / "head", *options)
        try:
            assert node.comes_up(), node.printed
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + PATIENCE_S
            while (told := status(f"{url}/api/version")) != 401:
                assert time.monotonic() < deadline, told
                time.sleep(0.3)
            yield url, token
        finally:
            node.kill()


def test_the_dashboard_and_its_apis_ask_for_the_token(head: tuple[str, str]) -> None:
    url, token = head
    for path in ("/api/version", "/api/jobs/", "/api/serve/applications/", "/nodes?view=summary"):
        assert status(url + path) == 401, path
        assert status(url + path, "0" * 64) == 403, path
        assert status(url + path, token) == 200, path
