"""The routes beside those that decode, and the decoder that a request names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from d3llm_ray import __version__
from d3llm_ray.decoding import PRESETS, DiffusionLLM, Request
from d3llm_ray.errors import InputError
from d3llm_ray.serving.schemas import CHAT
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.settings import ReplicaSettings

MESSAGES = [{"role": "user", "content": "Tom has 5 apples and buys 7 more."}]
FULL_ATTENTION = sorted(PRESETS.keys() - {"fast-dllm-v2", "autoregressive"})


def test_version(client: TestClient) -> None:
    assert client.get("/version").json() == {"version": __version__}


def test_ready_and_health_follow_the_engine(make_service: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    service: ChatService = make_service()
    with client_of(service) as client:
        assert client.get("/ready").json() == {"status": "ready"}
        assert client.get("/health").json() == {"status": "ok"}
        monkeypatch.setattr(service.worker, "problem", lambda: "the engine has failed")
        for route, code in (("/ready", "not_ready"), ("/health", "unhealthy")):
            response = client.get(route)
            assert response.status_code == 503
            assert response.json()["error"] == {
                "message": "the engine has failed",
                "type": "service_unavailable",
                "param": None,
                "code": code,
            }


# Tokens


def test_tokenize_messages_is_what_a_chat_is_charged(client: TestClient, service: ChatService) -> None:
    told = client.post("/tokenize", json={"messages": MESSAGES, "model": "tiny-random"}).json()
    assert told["tokens"] == service.llm.encode(MESSAGES)
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), 256)
    usage = client.post(CHAT, json={"model": "tiny-random", "messages": MESSAGES, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == told["count"]


@pytest.mark.parametrize("text", ["Tom has 5 apples.", "7", ""])
def test_a_text_comes_back_from_its_tokens(client: TestClient, text: str) -> None:
    told = client.post("/tokenize", json={"prompt": text}).json()
    assert told["count"] == len(told["tokens"])
    assert client.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": text}


def test_a_text_plants_no_control_token(client: TestClient, service: ChatService) -> None:
    tokenizer = service.llm.tokenizer
    assert tokenizer is not None
    forged = "".join(str(token) for token in tokenizer.all_special_tokens)
    tokens = client.post("/tokenize", json={"prompt": forged}).json()["tokens"]
    assert not {*tokens} & {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}


def test_detokenize_shows_special_tokens(client: TestClient, service: ChatService) -> None:
    tokenizer = service.llm.tokenizer
    assert tokenizer is not None
    shown = client.post("/detokenize", json={"tokens": [tokenizer.mask_token_id]}).json()
    assert shown == {"prompt": tokenizer.mask_token}


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("tokenize", {"prompt": 5}, "prompt"),
        ("tokenize", {"messages": []}, "messages"),
        ("tokenize", {"prompt": "a", "add_special_tokens": True}, "add_special_tokens"),
        ("tokenize", {"prompt": float("nan")}, "prompt"),
        ("detokenize", {}, "tokens"),
        ("detokenize", {"tokens": [-1]}, "tokens.0"),
        ("detokenize", {"tokens": [10**9]}, "tokens"),
        ("detokenize", {"tokens": [True]}, "tokens.0"),
        ("detokenize", {"tokens": "12"}, "tokens"),
    ],
)
def test_a_bad_text_body_is_refused_by_name(client: TestClient, route: str, body: Any, param: str) -> None:
    content = json.dumps(body)
    response = client.post(f"/{route}", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("body", [{"prompt": "a"}, {"tokens": [5]}])
def test_another_model_is_not_found(client: TestClient, body: dict[str, Any]) -> None:
    route = "/tokenize" if "prompt" in body else "/detokenize"
    assert client.post(route, json={**body, "model": "gpt-4"}).status_code == 404


# The decoder of a request


@pytest.mark.parametrize("name", FULL_ATTENTION)
def test_a_request_names_its_decoder(client: TestClient, tiny_checkpoint: Any, name: str) -> None:
    body = {"model": "tiny-random", "messages": MESSAGES, "max_tokens": 24, "diffusion": {"decoder": name}}
    answer = client.post(CHAT, json=body).json()
    (expected,) = DiffusionLLM.from_pretrained(tiny_checkpoint).generate([MESSAGES], max_tokens=24, decoder=name)
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["usage"]["forwards"] == expected.forwards


def test_settings_go_with_the_decoder_that_is_named(
    client: TestClient, service: ChatService, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []

    def submit(request: Request, *_: Any) -> Any:
        asked.append(request)
        raise RuntimeError

    monkeypatch.setattr(service.worker, "submit", submit)
    fields = {"decoder": "vanilla", "steps": 7}
    client.post(CHAT, json={"model": "tiny-random", "messages": MESSAGES, "diffusion": fields})
    assert asked[0].decoder == PRESETS["vanilla"].override(steps=7)


def test_the_servers_own_decoder_keeps_what_its_operator_has_set(make_service: Any, client_of: Any) -> None:
    service: ChatService = make_service(
        decoder="dparallel", decoder_settings={"entropy_threshold": 0.125}, request_decoders=["vanilla"]
    )
    assert service.decoders["dparallel"].settings()["entropy_threshold"] == 0.125
    with client_of(service) as client:
        assert client.get("/v1/models").json()["data"][0]["decoders"] == ["dparallel", "vanilla"]
        for name, status in (("dparallel", 200), ("vanilla", 200), ("d3llm", 400)):
            body = {"model": "tiny-random", "messages": MESSAGES, "max_tokens": 4, "diffusion": {"decoder": name}}
            response = client.post(CHAT, json=body)
            assert response.status_code == status
        error = response.json()["error"]
        assert error["param"] == "diffusion.decoder"
        assert error["message"].endswith("accepted: dparallel, vanilla")


def test_models_lists_all_that_fit_where_nothing_is_set(client: TestClient) -> None:
    decoders = client.get("/v1/models").json()["data"][0]["decoders"]
    assert decoders[0] == "d3llm" and sorted(decoders) == FULL_ATTENTION


@pytest.mark.parametrize(("model", "name"), [("tiny-ar", "vanilla"), ("tiny-llada", "autoregressive")])
def test_a_decoder_that_does_not_fit_is_refused_at_the_start(model: str, name: str) -> None:
    with pytest.raises(InputError, match=f"^request_decoders: .*{name}.*accepted: "):
        ReplicaSettings(model=model, request_decoders=[name]).checked()


def test_the_autoregressive_model_knows_its_own_decoder_alone() -> None:
    assert list(ReplicaSettings(model="tiny-ar").request_presets()) == ["autoregressive"]
