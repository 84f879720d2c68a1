"""Ray's own token authentication: what it covers, what it does not, and that serving works with it.

On a head of its own: it is what an operator's cluster is from Ray 2.61 on, where it is the default.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests.chaos.cluster import Node, free_port

ROOT = Path(__file__).parents[2]
PATIENCE_S = 180.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Head:
    """A cluster with token authentication: where its parts listen, and the environments with and without its token."""

    node: Node
    gcs: int
    dashboard: int
    token: str
    inside: dict[str, str]
    outside: dict[str, str]

    def status(self, path: str, token: str | None = None) -> int:
        """The dashboard's answer."""
        return status(f"http://127.0.0.1:{self.dashboard}{path}", token)

    def listens(self) -> dict[int, set[str]]:
        """Addresses by port, of every process of the cluster."""
        found: dict[int, set[str]] = {}
        for pid in self.node.pids():
            for connection in psutil.Process(pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.setdefault(connection.laddr.port, set()).add(connection.laddr.ip)
        return found


def status(url: str, token: str | None = None) -> int:
    request = urllib.request.Request(url, headers={} if token is None else {"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def until(url: str, wanted: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (told := status(url)) != wanted:
        assert time.monotonic() < deadline, told
        time.sleep(0.3)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Neither dashboard nor Serve are told where to listen: the default is looked at."""
    gcs, dashboard, token = free_port(), free_port(), secrets.token_hex(32)
    options = ["--head", f"--port={gcs}", f"--ray-client-server-port={free_port()}"]
    options += ["--include-dashboard=true", f"--dashboard-port={dashboard}"]
    with tempfile.TemporaryDirectory(prefix="d3-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "token"
        path.write_text(token)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("HOME", folder)  # a developer's own token is not looked for
        outside = dict(os.environ)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
        node = Node(Path(folder) / "head", *options)
        try:
            assert node.comes_up(), node.printed
            made = Head(node, gcs, dashboard, token, dict(os.environ), outside)
            until(f"http://127.0.0.1:{dashboard}/api/version", 401)
            yield made
        finally:
            node.kill()


def test_the_dashboard_and_its_apis_ask_for_the_token(head: Head) -> None:
    for path in ("/api/version", "/api/jobs/", "/api/serve/applications/", "/nodes?view=summary"):
        assert head.status(path) == 401, path
        assert head.status(path, "0" * 64) == 403, path
        assert head.status(path, head.token) == 200, path


def test_d3llm_ray_serve_joins_with_the_token_and_not_without(head: Head, tiny_checkpoint: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "d3llm_ray.cli", "serve", "--model", str(tiny_checkpoint), "--port", str(port)]
    address = {"RAY_ADDRESS": f"127.0.0.1:{head.gcs}"}
    refused = subprocess.run(
        command, env=head.outside | address, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert refused.returncode == 2, refused.stderr
    # Ray asks again for a minute, and says so in lines of its own.
    assert refused.stderr.strip().splitlines()[-1].startswith("d3llm-ray: RAY_ADDRESS: got "), refused.stderr
    serving = subprocess.Popen(command, env=head.inside | address, stderr=subprocess.PIPE, text=True)
    try:
        until(f"http://127.0.0.1:{port}/health", 200)
        assert head.listens()[port] == {"127.0.0.1"}
    finally:
        serving.send_signal(signal.SIGTERM)
        _, said = serving.communicate(timeout=PATIENCE_S)
    assert serving.returncode == 0, said
    assert head.token not in said
    assert status(f"http://127.0.0.1:{port}/health") == 0


def test_serve_deploy_brings_the_token_and_serves_port_does_not_ask_for_it(
    head: Head, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    port = free_port()
    content = yaml.safe_load((ROOT / "serve_configs" / "tiny.yaml").read_text())
    content["http_options"] = {"port": port}
    content["applications"][0]["args"] |= {"model": str(tiny_checkpoint)}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    program = str(Path(sys.executable).with_name("serve"))
    command = [program, "deploy", "-a", f"http://127.0.0.1:{head.dashboard}", str(config)]
    refused = subprocess.run(command, env=head.outside, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert refused.returncode != 0
    assert status(f"http://127.0.0.1:{port}/health") == 0
    subprocess.run(command, env=head.inside, check=True, capture_output=True, timeout=PATIENCE_S)
    until(f"http://127.0.0.1:{port}/health", 200)  # without Ray's token: that is what API keys are for
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10) as response:
        assert json.load(response)["data"][0]["id"] == "tiny-random"
    listening = head.listens()
    assert listening[port] == {"127.0.0.1"}
    assert listening[head.dashboard] == {"127.0.0.1"}
    print(
        "ports that others reach:",
        {port: addresses for port, addresses in listening.items() if addresses != {"127.0.0.1"}},
    )
