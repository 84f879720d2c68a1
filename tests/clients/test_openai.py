"""The `openai` package as it is, against a served model: every way to call it gives the offline API's answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.serving.local import serve_locally
from d3llm_ray.serving.settings import ReplicaSettings

QUESTION = "Tom has 5 apples and buys 7 more. How many apples does Tom have?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
ASK: dict[str, Any] = {"model": "tiny-random", "messages": MESSAGES, "max_tokens": 48}
# One token a forward to the end of the canvas: the longest answer there is.
SLOW = {"max_tokens": 128, "extra_body": {"diffusion": {"entropy_threshold": 0.0, "early_stop": False}}}


@pytest.fixture
def client(served: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def answer(offline: DiffusionLLM) -> str:
    return offline.generate([QUESTION], max_tokens=48)[0].text


def test_sync(client: openai.OpenAI, answer: str) -> None:
    completion = client.chat.completions.create(**ASK)
    assert completion.choices[0].message.content == answer
    assert completion.object == "chat.completion" and completion.usage is not None
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    assert [model.id for model in client.models.list()] == ["tiny-random"]
    assert client.models.retrieve("tiny-random").owned_by == "d3llm-ray"


def test_streaming(client: openai.OpenAI, answer: str) -> None:
    with client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == answer
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0


def test_the_helper_for_streams(client: openai.OpenAI, answer: str) -> None:
    """It raises for an answer that its length has cut off, so this one ends at a stop string."""
    stop = answer[len(answer) // 2 :][:4]
    with client.chat.completions.stream(**ASK, stop=stop) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == answer[: answer.index(stop)]
    assert final.choices[0].finish_reason == "stop"


def test_async_and_many_at_once(served: str, offline: DiffusionLLM) -> None:
    questions = [f"{n} + {n} ?" for n in range(8)]

    async def ask(client: openai.AsyncOpenAI, question: str, stream: bool) -> str:
        messages: list[Any] = [{"role": "user", "content": question}]
        if stream:
            chunks = await client.chat.completions.create(model="tiny-random", messages=messages, stream=True)
            return "".join([c.choices[0].delta.content or "" async for c in chunks if c.choices])
        whole = await client.chat.completions.create(model="tiny-random", messages=messages)
        return whole.choices[0].message.content or ""

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, text, n % 2 == 0) for n, text in enumerate(questions)))

    expected = [output.text for output in offline.generate(questions, max_tokens=32)]
    assert asyncio.run(all_of_them()) == expected


def test_raw_responses(client: openai.OpenAI, answer: str) -> None:
    raw = client.chat.completions.with_raw_response.create(**ASK, extra_headers={"X-Request-Id": "mine-7"})
    assert raw.status_code == 200 and raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].message.content == answer
    with client.chat.completions.with_streaming_response.create(**ASK) as streamed:
        assert streamed.parse().choices[0].message.content == answer


def test_an_answer_sent_back_as_history(client: openai.OpenAI, offline: DiffusionLLM) -> None:
    """As the object that the package made of it, and as the dictionary it dumps, nulls included."""
    first = client.chat.completions.create(**ASK).choices[0].message
    follow_up = {"role": "user", "content": "And 2 more?"}
    as_dict = {"role": "assistant", "content": first.content}
    (expected,) = offline.generate([[*MESSAGES, as_dict, follow_up]], max_tokens=16)
    for turn in (first, first.model_dump(), first.to_dict()):
        history: list[Any] = [*MESSAGES, turn, follow_up]
        again = client.chat.completions.create(model="tiny-random", messages=history, max_tokens=16)
        assert again.choices[0].message.content == expected.text


@pytest.mark.parametrize(
    ("fields", "kind", "param", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
        ({"max_tokens": 10**9}, openai.BadRequestError, "max_tokens", "invalid_value"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools", None),
        ({"extra_body": {"thresold": 1}}, openai.BadRequestError, "thresold", "unknown_parameter"),
        ({"messages": [{"role": "user", "content": "5 " * 300}]}, openai.BadRequestError, "messages", None),
        ({"messages": [{"role": "user", "content": "x" * 1_100_000}]}, openai.APIStatusError, None, None),
    ],
)
def test_errors_are_the_package_s_classes(
    client: openai.OpenAI,
    fields: dict[str, Any],
    kind: type[openai.APIStatusError],
    param: str | None,
    code: str | None,
) -> None:
    for stream in (False, True):
        with pytest.raises(kind) as refused:
            client.chat.completions.create(**{**ASK, **fields}, stream=stream)
        assert refused.value.param == param and code in (None, refused.value.code)
        assert refused.value.status_code == {openai.NotFoundError: 404, openai.BadRequestError: 400}.get(kind, 413)


@pytest.fixture
def narrow(tiny_checkpoint: Path) -> Iterator[str]:
    """One slot and no queue."""
    settings = ReplicaSettings(model=str(tiny_checkpoint), max_batch_size=1, max_queue=0, max_tokens_limit=128)
    with serve_locally(settings) as url:
        yield url


def test_429_is_a_rate_limit_and_max_retries_waits_it_out(narrow: str) -> None:
    with openai.OpenAI(base_url=f"{narrow}/v1", api_key="none", max_retries=0, timeout=60) as client:
        holding = client.chat.completions.create(**{**ASK, **SLOW}, stream=True)
        next(iter(holding))
        with pytest.raises(openai.RateLimitError) as full:
            client.chat.completions.create(**ASK)
        assert full.value.code == "queue_full" and full.value.response.headers["Retry-After"] == "1"
        threading.Timer(0.2, holding.close).start()
        began = time.monotonic()
        patient = client.with_options(max_retries=5)
        assert patient.chat.completions.with_raw_response.create(**ASK).retries_taken >= 1
        assert time.monotonic() - began >= 0.5  # it waited as it was told, about a second
