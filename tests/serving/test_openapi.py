"""The OpenAPI document says what the server does: JSON Schema, which knows nothing of it, judges the same bodies."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from d3llm_ray.decoding import PRESETS
from d3llm_ray.serving.schemas import CHAT, COMPLETIONS
from tests.serving.test_http_app import QUESTION, events

jsonschema = pytest.importorskip("jsonschema")  # ray brings it

MESSAGES = [{"role": "user", "content": QUESTION}]
CHAT_BODIES: list[dict[str, Any]] = [
    {},
    {"messages": None},
    {"messages": []},
    {"messages": [{"role": "assistant"}]},
    {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "wizard", "content": "a"}]},
    {"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"messages": [{"role": "user", "content": "a", "colour": ""}]},
    {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]},
    {"max_tokens": 128},
    {"max_tokens": 129},
    {"max_tokens": 0},
    {"max_tokens": True},
    {"max_completion_tokens": 129},
    {"n": 8},
    {"n": 9},
    {"top_k": -1},
    {"top_k": -2},
    {"top_p": 0},
    {"seed": 2**63 - 1},
    {"seed": 2**63},
    {"stop": "a"},
    {"stop": ["a"] * 4},
    {"stop": ["a"] * 5},
    {"stop": [""]},
    {"stop": None},
    {"stop_token_ids": [5]},
    {"stop_token_ids": [10**9]},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"stream": False, "stream_options": {"include_usage": True}},
    {"stream_options": None},
    {"stream": True, "diffusion": {"events": True}},
    {"diffusion": {"events": True}},
    {"logprobs": True, "top_logprobs": 20},
    {"logprobs": True, "top_logprobs": 21},
    {"top_logprobs": 1},
    {"top_logprobs": 0},
    {"tools": []},
    {"tools": [{}]},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_object"}},
    {"guided_json": None},
    {"guided_json": {}},
    {"unknown": 1},
    {"diffusion": {"decoder": "d3llm"}},
    {"diffusion": {"decoder": None, "entropy_threshold": 0.3}},
    {"diffusion": {"entropy_threshold": -0.1}},
    {"diffusion": {"entropy_threshold": 10_001}},
    {"diffusion": {"steps": 8}},
    {"diffusion": {"decoder": "vanilla", "steps": 8}},
    {"diffusion": {"decoder": "vanilla", "steps": 129}},
    {"diffusion": {"decoder": "vanilla", "eps": 0.5}},
    {"diffusion": {"decoder": "vanilla", "eps": 1}},
    {"diffusion": {"decoder": "vanilla", "eps": 0}},
    {"diffusion": {"decoder": "vanilla", "remasking": "random"}},
    {"diffusion": {"decoder": "vanilla", "remasking": "never"}},
    {"diffusion": {"decoder": "fast-dllm-v2"}},
    {"diffusion": {"block_add_threshold": 1.5}},
    {"diffusion": {"early_stop": 1}},
]
PROMPTS: list[dict[str, Any]] = [
    {"prompt": "a"},
    {"prompt": ""},
    {"prompt": ["a", "b"]},
    {"prompt": []},
    {"prompt": [5]},
    {"prompt": [-5]},
    {"prompt": [10**9]},
    {"prompt": [[5], [6]]},
    {"prompt": [[5], []]},
    {"prompt": [[5], "a"]},
    {"prompt": [5, "a"]},
    {"prompt": None},
    {"prompt": "a", "logprobs": 5},
    {"prompt": "a", "logprobs": 6},
    {"prompt": "a", "echo": True},
    {"prompt": "a", "echo": True, "logprobs": 1},
    {"prompt": "a", "suffix": ""},
    {"prompt": "a", "suffix": "b"},
    {"prompt": "a", "best_of": 1},
    {"prompt": "a", "best_of": 2},
]
TEXTS: list[tuple[str, dict[str, Any]]] = [
    ("/tokenize", {"prompt": ""}),
    ("/tokenize", {"messages": MESSAGES}),
    ("/tokenize", {"messages": MESSAGES, "prompt": None}),
    ("/tokenize", {"messages": MESSAGES, "prompt": "a"}),
    ("/tokenize", {}),
    ("/tokenize", {"prompt": 5}),
    ("/detokenize", {"tokens": []}),
    ("/detokenize", {"tokens": [5, 6]}),
    ("/detokenize", {"tokens": [10**9]}),
    ("/detokenize", {}),
]
BODIES = [
    *((CHAT, {"messages": MESSAGES, "max_tokens": 2, **body}) for body in CHAT_BODIES),
    *((COMPLETIONS, {"max_tokens": 2, **body}) for body in PROMPTS),
    *TEXTS,
]


@pytest.fixture(scope="module")
def document(client: TestClient) -> Any:
    return client.get("/openapi.json").json()


def judge(document: Any, schema: dict[str, Any]) -> Any:
    return jsonschema.Draft202012Validator({**schema, "components": document["components"]})


@pytest.mark.parametrize(("route", "body"), BODIES, ids=lambda value: str(value)[-60:])
def test_a_body_is_accepted_where_the_document_accepts_it(
    client: TestClient, document: Any, route: str, body: dict[str, Any]
) -> None:
    body = {"model": "tiny-random", **body}
    operation = document["paths"][route]["post"]
    accepted = judge(document, operation["requestBody"]["content"]["application/json"]["schema"]).is_valid(body)
    response = client.post(route, json=body)
    assert response.status_code == (200 if accepted else 400), response.text
    answers = operation["responses"][str(response.status_code)]["content"]
    kind = response.headers["content-type"].partition(";")[0]
    assert kind in answers
    if kind == "application/json":
        judge(document, answers[kind]["schema"]).validate(response.json())


@pytest.mark.parametrize("chunk", ["ChatChunk", "TextChunk"])
def test_the_data_of_events_are_of_the_schema_that_is_named(client: TestClient, document: Any, chunk: str) -> None:
    asked: dict[str, Any] = {"model": "tiny-random", "stream": True, "max_tokens": 4, "diffusion": {"events": True}}
    asked |= {"stream_options": {"include_usage": True}}
    route, asked = (
        (CHAT, asked | {"messages": MESSAGES}) if chunk == "ChatChunk" else (COMPLETIONS, asked | {"prompt": "5"})
    )
    assert f"`{chunk}`" in document["paths"][route]["post"]["responses"]["200"]["description"]
    for event in events(client.post(route, json=asked)):
        judge(document, {"$ref": f"#/components/schemas/{chunk}"}).validate(event)


def test_examples_are_answered_and_no_status_is_forgotten(client: TestClient, document: Any) -> None:
    for route, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["description"], route
            assert "422" not in operation["responses"]
            for status, answer in operation["responses"].items():
                assert status == "200" or answer["content"]["application/json"]["schema"] == {
                    "$ref": "#/components/schemas/ErrorBody"
                }
            if method == "post":
                name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                for example in document["components"]["schemas"][name]["examples"]:
                    assert client.post(route, json=example).status_code == 200
                assert {"400", "404", "413", "431"} <= operation["responses"].keys()
    for route in (CHAT, COMPLETIONS):
        assert {"408", "429", "500", "503"} <= document["paths"][route]["post"]["responses"].keys()


def test_the_document_names_the_model_its_limits_and_its_decoders(document: Any) -> None:
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["model"]["enum"] == ["tiny-random"]
    assert fields["max_tokens"]["anyOf"][0]["maximum"] == 128
    variants = document["components"]["schemas"]["Diffusion"]["anyOf"]
    named = {variant["title"]: set(variant["properties"]) - {"decoder", "events"} for variant in variants}
    assert named == {
        name: set(PRESETS[name].settings()) for name in PRESETS.keys() - {"fast-dllm-v2", "autoregressive"}
    }


def test_keys_are_asked_for_where_the_server_asks(
    make_service: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch, document: Any
) -> None:
    assert "securitySchemes" not in document["components"]
    monkeypatch.setenv("D3LLM_RAY_API_KEYS", "secret")
    with client_of(make_service()) as guarded:
        told = guarded.get("/openapi.json", headers={"Authorization": "Bearer secret"}).json()
        for route, methods in told["paths"].items():
            for method, operation in methods.items():
                asks = guarded.request(method, route).status_code == 401
                assert ("security" in operation) == ("401" in operation["responses"]) == asks


def test_another_method_is_told_which_is_allowed(client: TestClient) -> None:
    response = client.get(CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
