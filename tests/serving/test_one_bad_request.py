"""One bad prompt costs one answer: the others get theirs, and the bad one is told why, in OpenAI's shape."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.serving.schemas import CHAT
from d3llm_ray.serving.service import ChatService

GOOD = ["2 + 3 ?", "Tom has 5 apples. How many?", "7 * 6 ?"]
BAD = "Ann buys 4 pens."


def body(content: str, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny-random", "messages": [{"role": "user", "content": content}], "max_tokens": 40, **fields}


@pytest.mark.parametrize("stream", [False, True])
def test_logits_that_are_not_finite_fail_their_request_alone(make_service: Any, client_of: Any, stream: bool) -> None:
    service: ChatService = make_service(max_batch_size=4)
    llm: DiffusionLLM = service.llm
    expected = llm.generate(GOOD, max_tokens=40)
    met = {token for output in expected for token in (*output.prompt_ids, *output.response_ids)}
    poison = next(token for token in llm.encode(BAD) if token not in met)
    with torch.no_grad():
        llm.model.embed_tokens.weight[poison] = torch.nan
    with client_of(service) as client, ThreadPoolExecutor(4) as pool:
        good = [pool.submit(client.post, CHAT, json=body(text)) for text in GOOD]
        bad = client.post(CHAT, json=body(BAD, stream=stream))
        answers = [answer.result(60).json() for answer in good]
        assert [answer["choices"][0]["message"]["content"] for answer in answers] == [one.text for one in expected]
        assert [answer["usage"]["completion_tokens"] for answer in answers] == [len(one.token_ids) for one in expected]
        assert client.get("/health").status_code == 200
        assert service.worker.in_flight == 0
    assert bad.status_code == 500
    assert set(bad.json()) == {"error"}
    error = bad.json()["error"]
    assert "the model's logits are NaN or infinite in forward 1" in error.pop("message")
    assert error == {"type": "server_error", "param": None, "code": "decoding_failed"}


@pytest.mark.parametrize(
    "fields",
    [
        '"messages": [{"role": "user", "content": "cut emoji \\ud83d"}]',
        '"messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud83d"}]}]',
        '"messages": [{"role": "\\udc00", "content": "hi"}]',
        '"messages": [{"role": "user", "content": "hi"}], "stop": ["\\ud83d"]',
        '"messages": [{"role": "user", "content": "hi"}], "user": "\\ud83d"',
        '"messages": [{"role": "user", "content": "hi"}], "diffusion": {"\\ud83d": 1}',
    ],
)
def test_half_a_surrogate_pair_is_refused(client: TestClient, fields: str) -> None:
    content = f'{{"model": "tiny-random", {fields}}}'
    response = client.post(CHAT, content=content.encode(), headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"] == "body: accepted: valid Unicode, reasonably nested"
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_json")


def test_a_whole_surrogate_pair_is_a_character(client: TestClient) -> None:
    content = json.dumps(body("\N{GRINNING FACE} 2 + 3"))
    assert "\\ud83d\\ude00" in content
    response = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "list object has no element 7"),
        ("{{ 1 // 0 }}", "integer division or modulo by zero"),
        ("{% if %}", "Expected an expression, got 'end of statement block'"),
    ],
)
def test_what_a_template_refuses_is_refused_with_its_reason(
    client: TestClient, service: ChatService, monkeypatch: pytest.MonkeyPatch, template: str, reason: str
) -> None:
    monkeypatch.setattr(service.llm.tokenizer, "chat_template", template)
    response = client.post(CHAT, json=body("hi"))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"].startswith(f"messages: the model's chat template refuses them: {reason}")
    assert "\n" not in error["message"]
    assert "Traceback" not in response.text
    assert (error["type"], error["param"]) == ("invalid_request_error", "messages")
