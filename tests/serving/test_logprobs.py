"""Log probabilities at the reveal: OpenAI's format, and the figures of the engine that the core's tests hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.decoding.api import Output
from d3llm_ray.serving.schemas import CHAT, COMPLETIONS
from tests.serving.test_http_app import QUESTION, body, events

SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 3, "diffusion": {"entropy_threshold": 1.0}}


@pytest.fixture(scope="module")
def offline(tiny_checkpoint: Path) -> DiffusionLLM:
    return DiffusionLLM.from_pretrained(tiny_checkpoint)


def answer_of(offline: DiffusionLLM, prompt: Any, **fields: Any) -> Output:
    sampled = {"temperature": 1.0, "seed": 3, "entropy_threshold": 1.0}
    return offline.generate([prompt], max_tokens=40, **sampled, **fields)[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [None, 0, 3, 20])
def test_chat_tells_what_the_engine_reveals(
    client: TestClient, offline: DiffusionLLM, count: int | None, stream: bool
) -> None:
    expected = answer_of(offline, QUESTION)
    fields = {"logprobs": True, "max_tokens": 40, "stream": stream, **SAMPLED}
    response = client.post(CHAT, json=body(**fields) | ({} if count is None else {"top_logprobs": count}))
    content: list[Any] = []
    text = ""
    for part in events(response) if stream else [response.json()]:
        (ChatCompletionChunk if stream else ChatCompletion).model_validate(part)
        choice = part["choices"][0]
        content += choice["logprobs"]["content"] if choice["logprobs"] else []
        text += choice["delta"].get("content", "") if stream else choice["message"]["content"]
    assert text == expected.text
    assert offline.tokenizer is not None
    assert [entry["token"] for entry in content] == [offline.tokenizer.decode([token]) for token in expected.token_ids]
    told = [entry["logprob"] for entry in content]
    assert told == pytest.approx(expected.reveal_logprobs[: len(expected.token_ids)], abs=1e-4)
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        tops = entry["top_logprobs"]
        assert len(tops) == (count or 0)
        assert [top["logprob"] for top in tops] == sorted((top["logprob"] for top in tops), reverse=True)
        assert all(top["logprob"] <= 0 for top in tops)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [0, 2])
def test_completions_tell_the_same_in_their_own_format(
    client: TestClient, offline: DiffusionLLM, count: int, stream: bool
) -> None:
    prompt = [5, 9, 11]
    expected = answer_of(offline, prompt)
    fields = {"model": "tiny-random", "prompt": prompt, "max_tokens": 40, "logprobs": count, "stream": stream}
    response = client.post(COMPLETIONS, json=fields | SAMPLED)
    told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for part in events(response) if stream else [response.json()]:
        (choice,) = part["choices"]
        Completion.model_validate(part | {"choices": [choice | {"finish_reason": choice["finish_reason"] or "stop"}]})
        for name, values in (choice["logprobs"] or {}).items():
            told[name] += values
    assert offline.tokenizer is not None
    texts = [offline.tokenizer.decode([token]) for token in expected.token_ids]
    assert told["tokens"] == texts
    assert told["token_logprobs"] == pytest.approx(expected.reveal_logprobs[: len(texts)], abs=1e-4)
    assert told["text_offset"] == [len("".join(texts[:place])) for place in range(len(texts))]
    for text, logprob, tops in zip(texts, told["token_logprobs"], told["top_logprobs"], strict=True):
        assert tops[text] == logprob
        assert len(tops) in (max(count, 1), count + 1)


def test_a_stop_string_ends_the_tokens_where_it_ends_the_answer(client: TestClient) -> None:
    whole = client.post(CHAT, json=body(max_tokens=40)).json()["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 :][:4]
    for stream in (False, True):
        options = {"stream_options": {"include_usage": True}} if stream else {}
        response = client.post(CHAT, json=body(max_tokens=40, stop=stop, logprobs=True, stream=stream, **options))
        parts = events(response) if stream else [response.json()]
        choices = [choice for part in parts for choice in part["choices"]]
        count = sum(len(choice["logprobs"]["content"]) for choice in choices if choice["logprobs"])
        assert count == parts[-1]["usage"]["completion_tokens"] > 0


def test_a_greedy_answer_is_of_the_most_probable_tokens(client: TestClient) -> None:
    answer = client.post(CHAT, json=body(logprobs=True, top_logprobs=2, max_tokens=24)).json()
    for entry in answer["choices"][0]["logprobs"]["content"]:
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(entry["logprob"], abs=1e-5)


def test_each_choice_has_its_own_and_nobody_else_has_any(client: TestClient) -> None:
    answer = client.post(CHAT, json=body(n=3, logprobs=True, top_logprobs=1, max_tokens=24, **SAMPLED)).json()
    told = [choice["logprobs"]["content"] for choice in answer["choices"]]
    assert sum(map(len, told)) == answer["usage"]["completion_tokens"]
    assert len({str(content) for content in told}) == 3
    assert client.post(CHAT, json=body(max_tokens=4)).json()["choices"][0]["logprobs"] is None
    chunks = events(client.post(CHAT, json=body(max_tokens=4, stream=True)))
    assert all(choice["logprobs"] is None for chunk in chunks for choice in chunk["choices"])
