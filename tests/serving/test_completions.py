"""`POST /v1/completions`: text and token-id prompts, echo, streams; a model without a tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai import BadRequestError, OpenAI
from openai.types import Completion

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.serving.local import serve_locally
from d3llm_ray.serving.schemas import CHAT, COMPLETIONS
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.settings import ReplicaSettings
from tests.serving.test_http_app import events

TEXTS = ["Tom has 5 apples.", "2 + 3"]


def body(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny-random", "prompt": prompt, "max_tokens": 24, **fields}


@pytest.fixture(scope="module")
def offline(tiny_checkpoint: Path) -> DiffusionLLM:
    return DiffusionLLM.from_pretrained(tiny_checkpoint)


def plain_ids(llm: DiffusionLLM, text: str) -> list[int]:
    assert llm.tokenizer is not None
    ids: list[int] = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_the_four_ways_to_write_prompts(client: TestClient, offline: DiffusionLLM) -> None:
    ids = [plain_ids(offline, text) for text in TEXTS]
    expected = offline.generate(ids, max_tokens=24)
    for prompt, count in ((TEXTS[0], 1), (TEXTS[:1], 1), (ids[0], 1), (ids[:1], 1), (TEXTS, 2), (ids, 2)):
        answer = client.post(COMPLETIONS, json=body(prompt)).json()
        choices = Completion.model_validate(answer).choices
        assert [choice.text for choice in choices] == [one.text for one in expected[:count]]
        assert [choice.finish_reason for choice in choices] == [one.finish_reason for one in expected[:count]]
        assert answer["usage"]["prompt_tokens"] == sum(one.prompt_tokens for one in expected[:count])
        assert answer["usage"]["forwards"] == sum(one.forwards for one in expected[:count])


def test_streams_add_up(client: TestClient) -> None:
    fields = {"n": 2, "temperature": 1.0, "seed": 5}
    whole = client.post(COMPLETIONS, json=body(TEXTS, **fields)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(client.post(COMPLETIONS, json=body(TEXTS, **options, **fields)))
    texts, reasons = [""] * 4, [None] * 4
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        ended = choice | {"finish_reason": choice["finish_reason"] or "stop"}  # the package's type is that of a whole
        Completion.model_validate(chunk | {"choices": [ended]})
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
        assert chunk["usage"] is None and "token_ids" not in choice
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]
    assert chunks[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_each_prompt_before_its_answers(client: TestClient, offline: DiffusionLLM, stream: bool) -> None:
    texts: dict[Any, str] = {}
    for prompts in (TEXTS, [plain_ids(offline, text) for text in TEXTS]):
        answer = client.post(COMPLETIONS, json=body(prompts)).json()
        response = client.post(COMPLETIONS, json=body(prompts, echo=True, stream=stream))
        texts = dict.fromkeys(range(2), "")
        for part in events(response) if stream else [response.json()]:
            for choice in part["choices"]:
                texts[choice["index"]] += choice["text"]
        expected = [prompt + choice["text"] for prompt, choice in zip(TEXTS, answer["choices"], strict=True)]
        assert list(texts.values()) == expected


def test_a_stop_string_and_reveal_events(client: TestClient) -> None:
    whole = client.post(COMPLETIONS, json=body(TEXTS[0])).json()["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:4]
    choice = client.post(COMPLETIONS, json=body(TEXTS[0], stop=stop)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    chunks = events(client.post(COMPLETIONS, json=body(TEXTS[0], stream=True, diffusion={"events": True})))
    told = [chunk["diffusion"]["forward"] for chunk in chunks if "diffusion" in chunk]
    assert told == list(range(len(told))) and told


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ["a", [5]]}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [5, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [[5], [True]]}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": [[5]] * 100}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[5], []]}, "prompt.1"),
    ({"prompt": [[5], [10**9]]}, "prompt.1"),
    ({"prompt": [[5], [-1]]}, "prompt.1"),
    ({"prompt": [[5], [5] * 300]}, "prompt.1"),
    ({"prompt": [2**70]}, "prompt"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "messages"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 129}, "max_tokens"),
    ({"suffix": "behind"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"echo": True, "logprobs": 1, "max_tokens": 1}, "echo"),
    ({"n": 9}, "n"),
    ({"stream_options": {}}, "stream_options"),
    ({"diffusion": {"events": True}}, "diffusion.events"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:40])
def test_bad_field_is_named(client: TestClient, service: ChatService, fields: dict[str, Any], param: str) -> None:
    response = client.post(COMPLETIONS, json=body("7 * 6 ?") | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and error["message"].startswith(f"{param}: ")
    assert "\n" not in error["message"] and error["code"]
    assert service.worker.in_flight == 0


def test_what_lm_eval_asks_for_log_likelihoods_is_refused_with_the_reason(client: TestClient) -> None:
    asked = body([5, 6], echo=True, logprobs=1, temperature=0, seed=1234) | {"max_tokens": 1}
    error = client.post(COMPLETIONS, json=asked).json()["error"]
    assert error["code"] == "unsupported_parameter"
    assert "a diffusion model predicts masked positions" in error["message"]


def test_the_mask_token_and_an_unknown_model_are_refused(client: TestClient, service: ChatService) -> None:
    error = client.post(COMPLETIONS, json=body([5, service.llm.family.mask_token_id])).json()["error"]
    assert error["param"] == "prompt" and "mask token" in error["message"]
    assert client.post(COMPLETIONS, json=body("a") | {"model": "gpt-4"}).status_code == 404


def test_the_openai_package_completes(tiny_checkpoint: Path, offline: DiffusionLLM) -> None:
    expected = [one.text for one in offline.generate([plain_ids(offline, text) for text in TEXTS], max_tokens=16)]
    with serve_locally(ReplicaSettings(model=str(tiny_checkpoint))) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        answer = client.completions.create(model="tiny-random", prompt=TEXTS, max_tokens=16)
        assert [choice.text for choice in answer.choices] == expected
        streamed = ["", ""]
        for chunk in client.completions.create(model="tiny-random", prompt=TEXTS, max_tokens=16, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == expected
        with pytest.raises(BadRequestError, match="echo"):
            client.completions.create(model="tiny-random", prompt="a", echo=True, logprobs=1)


# A model without a tokenizer


@pytest.fixture(scope="module")
def bare_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bare") / "bare"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("tokenizer*", "special*", "chat_template*"))
    return folder


def test_a_model_without_a_tokenizer_answers_token_ids(bare_checkpoint: Path, client_of: Any) -> None:
    service = ChatService(ReplicaSettings(model=str(bare_checkpoint)))
    assert service.llm.tokenizer is None
    expected = DiffusionLLM.from_pretrained(bare_checkpoint).generate([[5, 6, 7], [8]], max_tokens=24)
    with client_of(service) as client:
        asked = {"model": "bare", "prompt": [[5, 6, 7], [8]], "max_tokens": 24}
        answer = client.post(COMPLETIONS, json=asked).json()
        Completion.model_validate(answer)
        assert [choice["token_ids"] for choice in answer["choices"]] == [one.token_ids for one in expected]
        assert [choice["text"] for choice in answer["choices"]] == ["", ""]
        streamed: list[list[int]] = [[], []]
        for chunk in events(client.post(COMPLETIONS, json=asked | {"stream": True, "logprobs": 1})):
            for choice in chunk["choices"]:
                streamed[choice["index"]] += choice.get("token_ids") or []
                for token in choice["logprobs"]["tokens"] if choice["logprobs"] else ():
                    assert token.startswith("token_id:")
        assert streamed == [one.token_ids for one in expected]
        refused = [
            (CHAT, {"model": "bare", "messages": [{"role": "user", "content": "hi"}]}, "messages"),
            (COMPLETIONS, {"model": "bare", "prompt": "hi"}, "prompt"),
            (COMPLETIONS, asked | {"echo": True}, "echo"),
            (COMPLETIONS, asked | {"stop": ["x"]}, "stop"),
            ("/tokenize", {"prompt": "hi"}, "prompt"),
            ("/detokenize", {"tokens": [5]}, "tokens"),
        ]
        for route, request, param in refused:
            response = client.post(route, json=request)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param), route
            assert response.json()["error"]["code"] == "no_tokenizer"


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_are_told_where_they_are_asked_for(client: TestClient, offline: DiffusionLLM, stream: bool) -> None:
    (expected,) = offline.generate([[5, 9, 11]], max_tokens=24)
    response = client.post(COMPLETIONS, json=body([5, 9, 11], return_token_ids=True, stream=stream))
    parts = events(response) if stream else [response.json()]
    assert [token for part in parts for token in part["choices"][0].get("token_ids") or []] == expected.token_ids
