"""Bodies of the OpenAI chat API, as far as a diffusion decoder can honour them.

Requests are strict: a field that is not listed here is refused, and so is a value that would have to be ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_STOPS = 4
MAX_STOP_IDS = 64
MAX_STOP_LENGTH = 256
MAX_MESSAGES = 1024
MAX_SEED = 2**63 - 1

FinishReason = Literal["stop", "length"]

# Parameters of OpenAI's API that this server cannot honour, with the values that ask for nothing. Clients often
# send those by default; any other value must not be ignored in silence.
NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _join_parts(content: object) -> object:
    """Concatenate `[{"type": "text", "text": ...}, ...]`; leave anything else to the field's own check."""
    if not isinstance(content, list):
        return content
    if not all(_is_text_part(part) for part in content):
        raise PydanticCustomError("content_part", "accepted: a string, or a list of parts of type text")
    return "".join(part["text"] for part in content)


def _is_text_part(part: object) -> bool:
    if not isinstance(part, dict) or part.keys() != {"type", "text"}:
        return False
    return part["type"] == "text" and isinstance(part["text"], str)


def _as_list(stop: object) -> object:
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else stop


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class Message(_Strict):
    """One turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]


class StreamOptions(_Strict):
    include_usage: bool = False


class ChatRequest(_Strict):
    """`POST /v1/chat/completions`.

    `diffusion` overrides decoding settings of the server's decoder for this request, for example
    `{"entropy_threshold": 0.3}`. `top_k` (0: off), `stop_token_ids` and `ignore_eos` mean what they mean in vLLM.
    `user` is accepted and ignored.
    """

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_IDS)
    ignore_eos: bool | None = None
    stop: Annotated[list[StopString], BeforeValidator(_as_list), Field(max_length=MAX_STOPS)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    diffusion: dict[str, Any] | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_whole_body(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        _require_encodable(body)
        for name in NEUTRAL_VALUES.keys() & body.keys():
            if body[name] is not None and not _is_neutral(name, body[name]):
                accepted = " or ".join(json.dumps(neutral) for neutral in NEUTRAL_VALUES[name])
                raise _refusal(name, f"not supported by this server; accepted: {accepted}", "unsupported_parameter")
        return {name: value for name, value in body.items() if name not in NEUTRAL_VALUES}

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise _refusal("max_tokens", "differs from max_completion_tokens; accepted: one of the two")
        if self.stream_options is not None and not self.stream:
            raise _refusal("stream_options", "accepted: only with stream set to true")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The answer length asked for, under either of its names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_stream_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def _require_encodable(body: dict[str, Any]) -> None:
    """Refuse what JSON can spell but no tokenizer or answer can carry: half a surrogate pair, bottomless nesting."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise _refusal("body", "accepted: valid Unicode, reasonably nested", "invalid_json") from error


def _is_neutral(name: str, value: object) -> bool:
    # 1 == True in Python, but "logprobs": 0 is not "logprobs": false.
    flag = isinstance(value, bool)
    return any(value == neutral and flag == isinstance(neutral, bool) for neutral in NEUTRAL_VALUES[name])


def _refusal(param: str, reason: str, code: str = "invalid_value") -> PydanticCustomError:
    """An error of the whole body that still names the field at fault."""
    return PydanticCustomError("refusal", "{reason}", {"param": param, "reason": reason, "code": code})


class Usage(BaseModel):
    """Token counts; `completion_tokens` are those before the stop token, `tpf` = completion_tokens / forwards.

    `forwards` counts the model calls in which the request took part, prefill and refreshes included.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    forwards: int
    tpf: float

    @staticmethod
    def count(prompt_tokens: int, completion_tokens: int, forwards: int) -> Usage:
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            forwards=forwards,
            tpf=round(completion_tokens / forwards, 3) if forwards else 0.0,
        )


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int = 0
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: None = None


class ChatCompletion(BaseModel):
    """The answer of a request without `stream`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ChunkDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int = 0
    delta: ChunkDelta
    finish_reason: FinishReason | None = None
    logprobs: None = None


class ChatChunk(BaseModel):
    """One event of a stream; `delta.content` extends the text sent so far and never rewrites it."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A served model with what its decoder does to it, approximations included."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["d3llm-ray"] = "d3llm-ray"
    max_model_len: int
    max_tokens_limit: int
    decoder: str
    decoder_settings: dict[str, Any]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
