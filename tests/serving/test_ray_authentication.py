"""Ray's own token authentication on a head of its own: who has no token deploys nothing and joins nothing."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

from d3llm_ray.serving.schemas import HEALTH
from tests.chaos.cluster import Node, free_port
from tests.serving.fleet import ask, eventually, status_of, text_of

PATIENCE_S = 180.0
ROOT = Path(__file__).parents[2]

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


@dataclass(frozen=True)
class Head:
    """A cluster that asks for a token, and how others come to it."""

    dashboard: str  # its URL
    address: str  # by which drivers join
    token: str
    environment: dict[str, str]  # of a client that has the token
    folder: Path

    def run(self, *words: str, **changed: str | None) -> subprocess.CompletedProcess[str]:
        """A command of a client whose environment is changed so."""
        return subprocess.run(
            [str(Path(sys.executable).with_name(words[0])), *words[1:]],
            env=self.client(**changed),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def client(self, **changed: str | None) -> dict[str, str]:
        """The environment of a client: None leaves a variable out."""
        whole = {**self.environment, "RAY_ADDRESS": self.address, **changed}
        return {name: value for name, value in whole.items() if value is not None}

    def wrong(self) -> dict[str, str]:
        """What makes a client one with another token."""
        other = self.folder / "other"
        other.write_text("0" * 64)
        return {"RAY_AUTH_TOKEN_PATH": str(other)}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    port, token = free_port(), secrets.token_hex(32)
    options = ["--head", "--port=0", f"--ray-client-server-port={free_port()}"]
    options += ["--include-dashboard=true", f"--dashboard-port={port}"]
    with tempfile.TemporaryDirectory(prefix="d3-", dir="/tmp") as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        path = folder / "token"
        path.write_text(token)
        patch.setenv("HOME", name)  # a developer's own token is not looked for
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
        node = Node(folder / "head", *options)
        try:
            assert node.comes_up(), node.printed
            url = f"http://127.0.0.1:{port}"
            eventually(lambda: status(f"{url}/api/version") == 401, PATIENCE_S)
            address = folder / "head" / "ray_current_cluster"  # written just after the head says that it has started
            eventually(address.exists, PATIENCE_S)
            yield Head(url, address.read_text().strip(), token, dict(os.environ), folder)
        finally:
            node.kill()


def test_the_dashboard_and_its_apis_ask_for_the_token(head: Head) -> None:
    for path in ("/api/version", "/api/jobs/", "/api/serve/applications/", "/nodes?view=summary"):
        assert status(head.dashboard + path) == 401, path
        assert status(head.dashboard + path, "0" * 64) == 403, path
        assert status(head.dashboard + path, head.token) == 200, path


@contextmanager
def serving(head: Head, port: int) -> Iterator[subprocess.Popen[str]]:
    """`d3llm-ray serve` of a client with the token."""
    words = ["serve", "--model", "tiny-llada", "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "d3llm_ray.cli", *words],
        env=head.client(),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_d3llm_ray_serve_joins_with_the_token_and_takes_down_what_it_started(head: Head) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with serving(head, port) as process:
        assert process.stderr is not None
        printed = list(takewhile(lambda line: not line.startswith("try "), process.stderr))  # until it serves, or ends
        assert process.poll() is None, printed
        assert text_of(ask(url, "tiny-llada", max_tokens=16))
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    assert status_of(url + HEALTH) == 0
    assert status(f"{head.dashboard}/api/version", head.token) == 200  # the cluster is not its own


@pytest.mark.parametrize("token", ["none", "wrong"])
def test_d3llm_ray_serve_without_the_token_is_refused(head: Head, token: str) -> None:
    changed: dict[str, Any] = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": None}
    words = ("-m", "d3llm_ray.cli", "serve", "--model", "tiny-llada", "--port", str(free_port()))
    done = head.run("python", *words, **(head.wrong() if token == "wrong" else changed))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"d3llm-ray: RAY_ADDRESS: got '{head.address}': ")


def test_serve_deploy_takes_the_token_and_is_refused_without(head: Head) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    content = yaml.safe_load((ROOT / "serve_configs" / "tiny.yaml").read_text())
    content["http_options"]["port"] = port
    file = head.folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(content))
    words = ("serve", "deploy", str(file), "-a", head.dashboard)
    for changed in ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": None}, head.wrong()):
        refused = head.run(*words, **changed)
        assert refused.returncode != 0 and "AuthenticationError" in refused.stderr
    deployed = head.run(*words)
    assert deployed.returncode == 0, deployed.stderr
    eventually(lambda: status_of(url + HEALTH) == 200, PATIENCE_S)
    assert text_of(ask(url, "tiny-llada", max_tokens=16))  # Serve's port asks for no token of Ray's
    stop = ("serve", "shutdown", "-y", "-a", head.dashboard)
    assert "Unable to shutdown Serve" in head.run(*stop, **head.wrong()).stdout  # exit code 0 all the same
    assert status_of(url + HEALTH) == 200
    assert head.run(*stop).returncode == 0
    eventually(lambda: status_of(url + HEALTH) != 200, PATIENCE_S)
