"""On Ray: replicas come and go with the load, are reconfigured and replaced, and several models share one URL."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.serving.front import running_replicas
from tests.serving.fleet import CHAT, Clients, ask, eventually, replica_pids, status_of, text_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # processes start, come and go
CONFIGS = Path(__file__).parents[2] / "serve_configs"
QUESTION: list[Any] = [{"role": "user", "content": "Tom has 5 apples and buys 7 more. How many now?"}]
# A token a forward: the longest answer there is.
SLOW = {"diffusion": {"entropy_threshold": 0.0, "early_stop": False}}
QUICK = {
    "max_replicas": 2,
    "policy": {
        "policy_function": "d3llm_ray.serving.autoscaling:CanvasDemand",
        "policy_kwargs": {"active_share": 0.75, "queued_tokens": 512},
    },
    "metrics_interval_s": 0.5,
    "look_back_period_s": 1,
    "upscale_delay_s": 0.5,
    "downscale_delay_s": 2,
}
# On a machine that is busy with other things a replica needs as long as the first one, which no load slowed down, and
# more beside the load that calls for it.
WITHIN_S, TIMES_FIRST = 10.0, 3.0
STARTS_WITHIN_S = 120.0  # on a machine however busy: not what is measured
CLIENTS, EVERY_S, UNDER_LOAD_S = 4, 0.2, 20.0  # 20 requests a second

Deploy = Callable[..., str]


@pytest.fixture
def deploy(serve_url: str) -> Iterator[Deploy]:
    """Deploys an application as `serve deploy` does, again if it is there; returns its URL."""
    names: set[str] = set()

    def deploy(name: str, application: dict[str, Any]) -> str:
        names.add(name)
        whole = {"import_path": "d3llm_ray.serving.app:build", **application, "name": name, "route_prefix": f"/{name}"}
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(ServeDeploySchema(applications=[whole]))
        eventually(lambda: serve.status().applications[name].status == "RUNNING", STARTS_WITHIN_S)
        url = f"{serve_url}/{name}"
        eventually(lambda: status_of(f"{url}/health") == 200, STARTS_WITHIN_S)
        return url

    yield deploy
    for name in names:
        serve.delete(name)


@pytest.fixture
def random_model(tiny_checkpoint: Path) -> Callable[..., dict[str, Any]]:
    """The application of a random model: `args`, and options of its deployment."""

    def make(args: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        return {
            "args": {"model": str(tiny_checkpoint), **(args or {})},
            "deployments": [{"name": "decoder", **options}],
        }

    return make


def test_a_second_replica_comes_with_a_load_and_goes_after_it(deploy: Deploy, random_model: Any) -> None:
    began = time.monotonic()
    scaling = {**QUICK, "min_replicas": 1}
    url = deploy("step", random_model({"max_batch_size": 2}, autoscaling_config=scaling))
    first = time.monotonic() - began
    assert running_replicas("step") == 1
    within_s = max(WITHIN_S, TIMES_FIRST * first)
    with Clients(url, 4, max_tokens=200, **SLOW) as clients:
        came = eventually(lambda: running_replicas("step") == 2, within_s)
    went = eventually(lambda: running_replicas("step") == 1, within_s)
    print(f"first replica after {first:.1f} s; second {came:.1f} s after the load, gone {went:.1f} s after it")
    assert set(clients.statuses) == {200}


def test_to_zero_and_back(deploy: Deploy, random_model: Any) -> None:
    """Serve's proxy holds a request until there is a replica: nothing of ours has to stay up."""
    url = deploy("zero", random_model(autoscaling_config={**QUICK, "min_replicas": 0, "initial_replicas": 1}))
    assert ask(url).status_code == 200
    eventually(lambda: running_replicas("zero") == 0, WITHIN_S)
    began = time.monotonic()
    assert ask(url).status_code == 200
    print(f"answered from zero replicas after {time.monotonic() - began:.1f} s")
    assert running_replicas("zero") == 1


def test_a_user_config_changes_the_decoder_and_not_the_process(
    deploy: Deploy, random_model: Any, tiny_checkpoint: Path
) -> None:
    name = f"reconfigured-{os.getpid()}"  # other clusters of this machine have processes as well

    def offline(decoder: str | None) -> tuple[str, int]:
        (output,) = DiffusionLLM.from_pretrained(tiny_checkpoint, decoder).generate([QUESTION], max_tokens=128)
        return output.text, output.forwards

    def answer(url: str) -> tuple[str, int]:
        told = ask(url, max_tokens=128)
        return text_of(told), told.json()["usage"]["forwards"]

    url = deploy(name, random_model(user_config={}))
    pids = replica_pids(name)
    assert len(pids) == 1
    usual, vanilla = offline(None), offline("vanilla")
    assert answer(url) == usual != vanilla
    body = {"model": "tiny-random", "messages": QUESTION, "max_tokens": 128, "stream": True, **SLOW}
    with httpx.stream("POST", url + CHAT, json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        deploy(name, random_model(user_config={"decoder": "vanilla"}))
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert answer(url) == vanilla
    deploy(name, random_model(user_config={"decoder": "d4llm"}))
    assert answer(url) == vanilla  # refused, in the replica's log
    deploy(name, random_model(user_config={}))
    assert answer(url) == usual
    assert replica_pids(name) == pids


def test_the_shipped_tiny_application_answers(deploy: Deploy) -> None:
    (application,) = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())["applications"]
    (expected,) = DiffusionLLM.from_pretrained("tiny-llada", "d3llm").generate([QUESTION], max_tokens=64)
    assert text_of(ask(deploy("tiny", application), "tiny-llada")) == expected.text


def test_two_models_behind_one_url_and_the_one_at_zero_comes_up(deploy: Deploy) -> None:
    (application,) = yaml.safe_load((CONFIGS / "multi-model.yaml").read_text())["applications"]
    url = deploy("multi-model", application)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    assert [model.id for model in client.models.list()] == ["tiny-llada", "fast"]
    assert running_replicas("multi-model", "fast") == 0  # listing wakes nobody
    for model in ("fast", "tiny-llada"):
        answer = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=64)
        chunks = list(client.chat.completions.create(model=model, messages=QUESTION, max_tokens=64, stream=True))
        assert answer.model == model
        assert answer.choices[0].message.content
        streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert streamed == answer.choices[0].message.content
    assert [card.to_dict()["decoder"] for card in client.models.list()] == ["d3llm", "fast-dllm-v2"]
    assert client.models.retrieve("fast").id == "fast"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=QUESTION)
    assert "accepted: tiny-llada, fast" in missing.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="fast", messages=QUESTION, max_tokens=10**9)
    assert bad.value.param == "max_tokens"
    assert status_of(f"{url}/ready") == 200


@pytest.mark.parametrize("several", [False, True])
def test_redeploys_of_one_replica_lose_no_request(
    deploy: Deploy, random_model: Any, tiny_checkpoint: Path, several: bool
) -> None:
    name = f"redeployed-{os.getpid()}"

    def application(number: int) -> dict[str, Any]:
        if several:
            return {"args": {"models": [{"model": str(tiny_checkpoint), "max_queue": 64 + number}]}}
        return random_model({"max_queue": 64 + number})  # type: ignore[no-any-return]

    url, number = deploy(name, application(0)), 0
    seen = replica_pids(name)
    began = time.monotonic()
    with Clients(url, CLIENTS, EVERY_S, max_tokens=16) as clients:
        while number == 0 or time.monotonic() < began + UNDER_LOAD_S:
            number += 1
            deploy(name, application(number))
            assert not replica_pids(name) <= seen  # a new process is there
            seen |= replica_pids(name)
            time.sleep(2)
        rate = len(clients.statuses) / (time.monotonic() - began)
    print(f"{number} redeploys under {rate:.1f} requests a second: {len(clients.statuses)} answers")
    assert clients.problems == []
    assert set(clients.statuses) == {200}
