"""Request bodies: what is accepted, what is refused and which field the refusal names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from pydantic import ValidationError

from d3llm_ray.serving.replies import ChatChunk, ChunkChoice, ChunkDelta, Usage
from d3llm_ray.serving.schemas import ChatRequest
from d3llm_ray.serving.sse import DONE, sse

MESSAGES = [{"role": "user", "content": "hi"}]


def request(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": MESSAGES, **fields})


def test_text_parts_are_joined() -> None:
    content = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert request(messages=[{"role": "user", "content": content}]).messages[0].content == "one two"


@pytest.mark.parametrize(("stop", "expected"), [(None, []), ("x", ["x"]), (["x", "y"], ["x", "y"])])
def test_stop_is_a_list(stop: object, expected: list[str]) -> None:
    assert request(stop=stop).stop == expected


def test_both_names_of_the_answer_length() -> None:
    assert request(max_tokens=3).answer_length == ("max_tokens", 3)
    assert request(max_completion_tokens=4).answer_length == ("max_completion_tokens", 4)
    assert request(max_tokens=5, max_completion_tokens=5).answer_length[1] == 5
    assert request().answer_length == ("max_tokens", None)


@pytest.mark.parametrize(
    "neutral",
    [{"best_of": 1}, {"tools": []}, {"response_format": {"type": "text"}}, {"guided_json": None}, {"n": None}],
)
def test_parameters_that_ask_for_nothing_are_accepted(neutral: dict[str, Any]) -> None:
    assert request(**neutral) == request()


@pytest.mark.parametrize("name", sorted({*CompletionCreateParamsBase.__annotations__, *ChatRequest.model_fields}))
def test_null_is_not_sent_in_any_field_of_ours_and_of_openai(name: str) -> None:
    if ChatRequest.model_fields.get(name) is not None and ChatRequest.model_fields[name].is_required():
        with pytest.raises(ValidationError) as caught:
            request(**{name: None})
        assert [(error["type"], error["loc"]) for error in caught.value.errors()] == [("missing", (name,))]
    else:
        assert request(**{name: None}) == request()


def test_null_is_not_sent_inside_either() -> None:
    parts = [{"type": "text", "text": "hi", "prompt_cache_breakpoint": None}]
    streaming = {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": None}}
    asked = request(messages=[{"role": "user", "content": parts, "name": None}], **streaming)
    assert asked == request(stream=True, stream_options={})
    assert not asked.wants_stream_usage


def test_an_answer_as_the_openai_package_sends_it_back_is_history() -> None:
    answer = ChatCompletionMessage(role="assistant", content="hello")
    plain = {"role": "assistant", "content": "hello"}
    for sent in (
        answer.model_dump(),
        answer.model_dump(exclude_none=True),
        answer.model_dump() | {"tool_calls": [], "annotations": [], "reasoning": "", "reasoning_content": None},
        answer.model_dump() | {"parsed": None},
    ):
        assert request(messages=[*MESSAGES, sent]) == request(messages=[*MESSAGES, plain])
    silent = ChatCompletionMessage(role="assistant", content=None).model_dump()
    assert request(messages=[*MESSAGES, silent]).messages[1].content == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_calls", [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
        ("refusal", "I cannot"),
        ("reasoning_content", "let me think"),
        ("colour", "red"),
        ("colour", ""),
    ],
)
def test_what_a_message_says_besides_its_text_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        request(messages=[{"role": "assistant", "content": "hello", field: value}])
    assert caught.value.errors()[0]["loc"] == ("messages", 0, field)


def test_a_developer_is_the_system() -> None:
    told = [{"role": "developer", "content": "be brief"}, *MESSAGES]
    assert request(messages=told) == request(messages=[{"role": "system", "content": "be brief"}, *MESSAGES])


def test_minus_one_switches_top_k_off() -> None:
    assert request(top_k=-1).top_k == request(top_k=0).top_k == 0
    for refused in (-2, -1.0, True):
        with pytest.raises(ValidationError):
            request(top_k=refused)


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 2},
        {"best_of": True},
        {"suffix": "behind"},
        {"frequency_penalty": 0.5},
        {"parallel_tool_calls": 1},
        {"guided_regex": "a"},
        {"top_logprobs": 2},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"max_tokens": 3, "max_completion_tokens": 4},
        {"stream_options": {"include_usage": True}},
    ],
)
def test_values_that_would_be_ignored_are_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        request(**fields)
    assert caught.value.errors()[0]["ctx"]["param"] == next(iter(fields))


def test_event_is_one_line_that_the_openai_package_reads() -> None:
    choice = ChunkChoice(delta=ChunkDelta(content='line\nbreak "é'))
    event = sse(ChatChunk(id="c", created=1, model="m", choices=[choice]))
    assert event.startswith("data: ")
    assert event.endswith("\n\n")
    assert event.count("\n") == 2
    body = json.loads(event.removeprefix("data: "))
    assert body["choices"][0]["delta"] == {"content": 'line\nbreak "é'}
    assert "usage" not in body
    assert ChatCompletionChunk.model_validate(body).choices[0].delta.content == 'line\nbreak "é'
    assert DONE == "data: [DONE]\n\n"


def test_usage_is_null_on_every_chunk_but_the_last_when_asked_for() -> None:
    chunk = ChatChunk(id="c", created=1, model="m", choices=[])
    assert json.loads(sse(chunk, show_usage=True).removeprefix("data: "))["usage"] is None


def test_usage_counts() -> None:
    assert Usage.count(7, 10, 4).model_dump() == {
        "prompt_tokens": 7,
        "completion_tokens": 10,
        "total_tokens": 17,
        "forwards": 4,
        "tpf": 2.5,
    }
