"""On Ray: a `user_config` that changes leaves the replica's process, and a redeploy loses no request."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.serving.app import application
from d3llm_ray.serving.settings import ApplicationSettings, ReplicaSettings
from tests.serving.fleet import CHAT, Clients, ask, eventually, replica_pids, status_of, text_of

QUESTION = [{"role": "user", "content": "Tom has 5 apples and buys 7 more. How many now?"}]
APP = f"redeployed-{os.getpid()}"  # of other clusters on this machine as well
CLIENTS, EVERY_S, UNDER_LOAD_S = 4, 0.2, 40.0  # 20 requests a second


@pytest.fixture
def deploy(serve_url: str, tiny_checkpoint: Path) -> Iterator[Any]:
    """Deploys the model, again if it is there; returns its URL."""

    def deploy(settings: ReplicaSettings | None = None, **options: Any) -> str:
        serve.run(
            application(settings or ReplicaSettings(model=str(tiny_checkpoint)), **options),
            name=APP,
            route_prefix=f"/{APP}",
        )
        url = f"{serve_url}/{APP}"
        eventually(lambda: status_of(f"{url}/health") == 200, 10)
        return url

    yield deploy
    serve.delete(APP)


def test_a_user_config_changes_the_decoder_and_not_the_process(deploy: Any, tiny_checkpoint: Path) -> None:
    def offline(decoder: str | None) -> tuple[str, int]:
        (output,) = DiffusionLLM.from_pretrained(tiny_checkpoint, decoder).generate([QUESTION], max_tokens=128)
        return output.text, output.forwards

    def answer(url: str) -> tuple[str, int]:
        told = ask(url, max_tokens=128)
        return text_of(told), told.json()["usage"]["forwards"]

    url = deploy()
    pids = replica_pids(APP)
    assert len(pids) == 1
    usual, vanilla = offline(None), offline("vanilla")
    assert answer(url) == usual != vanilla
    body = {"model": "tiny-random", "messages": QUESTION, "max_tokens": 128, "stream": True}
    body["diffusion"] = {"entropy_threshold": 0.0, "early_stop": False}  # a token a forward
    with httpx.stream("POST", url + CHAT, json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        deploy(user_config={"decoder": "vanilla"})
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert answer(url) == vanilla
    deploy(user_config={"decoder": "d4llm"})
    assert answer(url) == vanilla  # refused, in the replica's log
    deploy(user_config={})
    assert answer(url) == usual
    assert replica_pids(APP) == pids


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("several", [False, True])
def test_redeploys_of_one_replica_lose_no_request(deploy: Any, tiny_checkpoint: Path, several: bool) -> None:
    def settings(number: int) -> ReplicaSettings:
        values = {"model": str(tiny_checkpoint), "max_queue": 64 + number}
        return ApplicationSettings(models=[values]) if several else ReplicaSettings(**values)

    url, number = deploy(settings(0)), 0
    seen = replica_pids(APP)
    began = time.monotonic()
    with Clients(url, CLIENTS, EVERY_S, max_tokens=16) as clients:
        while time.monotonic() < began + UNDER_LOAD_S:
            number += 1
            deploy(settings(number))
            assert not replica_pids(APP) <= seen  # a new process is there
            seen |= replica_pids(APP)
            time.sleep(2)
    rate = len(clients.statuses) / (time.monotonic() - began)
    print(f"{number} redeploys under {rate:.1f} requests a second: {len(clients.statuses)} answers")
    assert number >= 2
    assert clients.problems == []
    assert set(clients.statuses) == {200}
