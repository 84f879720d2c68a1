"""The application on Ray Serve through the `openai` client, its YAML files, and how it starts and stops."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from ray import serve

from d3llm_ray.errors import InputError
from d3llm_ray.serving.app import build
from d3llm_ray.serving.server import serve_in_background
from d3llm_ray.serving.settings import ReplicaSettings, ServeSettings

ROOT = Path(__file__).parents[2]
MESSAGES: list[Any] = [{"role": "user", "content": "Tom has 5 apples and buys 7 more. How many now?"}]
# One token a forward to the end of the canvas: the longest answer there is.
SLOW = {"diffusion": {"entropy_threshold": 0.0, "early_stop": False}}
LONG = 200


@pytest.fixture(scope="module")
def url(ray_cluster: None, tiny_checkpoint: Path) -> Iterator[str]:
    """One slot and no queue, so that a slot which is not freed shows at once."""
    settings = ServeSettings(model=str(tiny_checkpoint), port=0, max_batch_size=1, max_queue=0)
    with serve_in_background(settings) as url:
        yield url
    assert serve.status().applications == {}


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="tiny-random", messages=MESSAGES, **fields)


def test_openai_client_gets_the_same_text_as_json_and_as_stream(client: openai.OpenAI) -> None:
    whole = ask(client, max_tokens=48)
    chunks = list(ask(client, max_tokens=48, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert whole.usage.forwards > 0


def test_openai_client_in_its_other_ways(url: str, client: openai.OpenAI) -> None:
    """Async, raw, and an answer sent back as history, through Serve's proxy; without Serve: tests/clients."""
    raw = client.chat.completions.with_raw_response.create(model="tiny-random", messages=MESSAGES, max_tokens=16)
    answer = raw.parse().choices[0].message
    assert raw.status_code == 200 and raw.headers["x-request-id"]
    history: list[Any] = [*MESSAGES, answer, {"role": "user", "content": "And 2 more?"}]

    async def ask_async() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=60) as patient:
            return await patient.chat.completions.create(model="tiny-random", messages=history, max_tokens=16)

    by_hand = [*MESSAGES, {"role": "assistant", "content": answer.content}, history[-1]]
    again = client.chat.completions.create(model="tiny-random", messages=by_hand, max_tokens=16)
    assert asyncio.run(ask_async()).choices[0].message.content == again.choices[0].message.content


def test_models_and_health(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-random"]
    with urllib.request.urlopen(f"{url}/health", timeout=10) as response:
        assert json.load(response) == {"status": "ok"}


def test_the_page_is_at_the_servers_address(url: str) -> None:
    with urllib.request.urlopen(url, timeout=10) as response:
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert b"playground/main.js" in response.read()
        assert "connect-src 'self'" in response.headers["Content-Security-Policy"]


def test_errors_have_the_types_that_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, n=2)
    assert bad.value.param == "n"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, max_tokens=10**9)
    assert long.value.param == "max_tokens"


def test_request_id_is_echoed_once(url: str) -> None:
    request = urllib.request.Request(f"{url}/v1/models", headers={"X-Request-Id": "mine-1"})
    with urllib.request.urlopen(request, timeout=10) as response:
        assert response.headers.get_all("x-request-id") == ["mine-1"]


def leave_and_return(client: openai.OpenAI, stream: bool, patience: float) -> float:
    """Begin a long answer, leave, and come back; seconds until the slot is free."""
    if stream:
        chunks = ask(client, max_tokens=LONG, extra_body=SLOW, stream=True)
        next(iter(chunks))
        chunks.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=patience), max_tokens=LONG, extra_body=SLOW)
    began = time.monotonic()
    while True:
        try:
            ask(client, max_tokens=1)
            return time.monotonic() - began
        except openai.RateLimitError:
            time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_frees_its_slot(client: openai.OpenAI, stream: bool) -> None:
    """That Serve passes the news on; how many forwards it takes is tested without Serve."""
    began = time.monotonic()
    ask(client, max_tokens=LONG, extra_body=SLOW)
    whole = time.monotonic() - began
    # Were the slot kept, every attempt would wait for nearly the whole answer; a busy machine delays one or two.
    assert min(leave_and_return(client, stream, whole / 10) for _ in range(5)) < whole / 2


def test_busy_slot_refuses(client: openai.OpenAI) -> None:
    chunks = ask(client, max_tokens=LONG, extra_body=SLOW, stream=True)
    next(iter(chunks))
    with pytest.raises(openai.RateLimitError) as full:
        ask(client, max_tokens=1)
    assert full.value.response.headers["retry-after"] == "1"
    assert list(chunks)[-1].choices[0].finish_reason is not None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modle": "x"}, "modle: unknown setting; accepted: model, "),
        ({"port": 8000}, "port: unknown setting"),
        ({"model": "nothing-here"}, "model: "),
        ({"decoder": "d4llm"}, "decoder: unknown value 'd4llm'; accepted: autoregressive, d2f, d3llm, "),
        ({"max_tokens": 512}, "max_tokens_limit: got 256; accepted: at least max_tokens, 512"),
        ({"decoder": "missing.yaml"}, "decoder: cannot read 'missing.yaml'"),
        ({"decoder_settings": {"speed": 3}}, "speed: no setting of decoder 'd3llm'; accepted: "),
        ({"decoder": "autoregressive"}, "decoder: 'autoregressive' cannot decode a 'llada' model"),
        ({"decoder_config": "tuned.yaml"}, "decoder_config: is called decoder now"),
        ({"device": "tpu"}, "device: got 'tpu'"),
    ],
)
def test_bad_arguments_stop_the_builder(tiny_checkpoint: Path, args: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        build({"model": str(tiny_checkpoint)} | args)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_decoder_is_a_preset_a_file_or_the_familys_own_and_single_settings_go_on_top(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.yaml"
    tuned.write_text("decoder: d3llm\nentropy_threshold: 0.7\n")
    decoder = ReplicaSettings(decoder=str(tuned)).decoding()
    assert (decoder.name, decoder.settings()["entropy_threshold"]) == ("d3llm", 0.7)
    over = ReplicaSettings(decoder=str(tuned), decoder_settings={"cache_delay": 2}).decoding().settings()
    assert over == decoder.settings() | {"cache_delay": 2} != decoder.settings()
    for model, name in (("tiny-llada", "d3llm"), ("tiny-fast-dllm-v2", "fast-dllm-v2"), ("tiny-ar", "autoregressive")):
        assert ReplicaSettings(model=model).decoding().name == name
    tuned.write_text("entropy_threshold: 0.7\n")
    with pytest.raises(InputError, match="tuned.yaml: decoder: got None; accepted: the name of a preset"):
        ReplicaSettings(decoder=str(tuned)).decoding()


@pytest.mark.parametrize(
    ("values", "cpus", "gpus"),
    [
        ({}, 1, 0),
        ({"device": "cuda"}, 1, 1),
        ({"device": "cuda:0", "cpus_per_actor": 4, "gpus_per_actor": 0.5}, 4, 0.5),
    ],
)
def test_replicas_ask_for_what_the_settings_say(
    tiny_checkpoint: Path, values: dict[str, Any], cpus: int, gpus: float
) -> None:
    options = build({"model": str(tiny_checkpoint), **values})._bound_deployment.ray_actor_options
    assert (options["num_cpus"], options["num_gpus"]) == (cpus, gpus)


def test_relative_paths_become_absolute(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_checkpoint.parent)
    (tiny_checkpoint.parent / "tuned.yaml").write_text("decoder: d3llm\n")
    settings = ReplicaSettings(model=tiny_checkpoint.name, decoder="tuned.yaml").checked()
    assert (settings.model, settings.decoder) == (str(tiny_checkpoint), str(tiny_checkpoint.parent / "tuned.yaml"))
    assert settings.model_id == tiny_checkpoint.name


def test_occupied_port_is_one_line_and_exit_code_2(tiny_checkpoint: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "jobs.serve", "--model", str(tiny_checkpoint), "--port", str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == f"d3llm-ray: port: {port} is in use on 127.0.0.1; accepted: a free port, or 0 for any"
