"""Bodies of the OpenAI chat API, as far as a diffusion decoder can honour them.

Requests are strict: a field that is not listed here is refused, and so is a value that would have to be ignored.
`null` is the same as leaving a field out, whatever the field: clients write it for all that they do not use.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

CHAT = "/v1/chat/completions"
HEALTH = "/health"

MAX_STOPS = 4
MAX_STOP_IDS = 64
MAX_STOP_LENGTH = 256
MAX_MESSAGES = 1024
MAX_SEED = 2**63 - 1

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
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}

# Fields of an answer's message that clients send back with the conversation; empty, they say nothing.
EMPTY_MESSAGE_FIELDS = (
    "refusal",
    "annotations",
    "tool_calls",
    "function_call",
    "audio",
    "reasoning",
    "reasoning_content",
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_sent(cls, body: Any) -> Any:
        return _without_nulls(body) if isinstance(body, dict) else body


def _without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _join_parts(content: object) -> object:
    """Concatenate `[{"type": "text", "text": ...}, ...]`; leave anything else to the field's own check."""
    if not isinstance(content, list):
        return content
    if not all(_is_text_part(part) for part in content):
        raise PydanticCustomError("content_part", "accepted: a string, or a list of parts of type text")
    return "".join(part["text"] for part in content)


def _is_text_part(part: object) -> bool:
    if not isinstance(part, dict) or _without_nulls(part).keys() != {"type", "text"}:
        return False
    return part["type"] == "text" and isinstance(part["text"], str)


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def _system_for_developer(role: object) -> object:
    return "system" if role == "developer" else role  # OpenAI's newer name for it, which no chat template knows


def _off_for_minus_one(top_k: object) -> object:
    return 0 if type(top_k) is int and top_k == -1 else top_k  # vLLM's older way to say it


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class Message(_Strict):
    """One turn of the conversation."""

    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_system_for_developer)]
    content: Annotated[str, BeforeValidator(_join_parts)]

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_empty(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        said = {name: value for name, value in message.items() if name not in EMPTY_MESSAGE_FIELDS or value}
        if said.get("role") == "assistant" and said.get("content") is None:
            said["content"] = ""  # OpenAI's own type of an answer allows it
        return said


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatRequest(_Strict):
    """`POST /v1/chat/completions`.

    `diffusion` overrides decoding settings of the server's decoder for this request, for example
    `{"entropy_threshold": 0.3}`, and asks for reveal events in a stream by `{"events": true}`. `top_k` (0 or -1: off),
    `stop_token_ids` and `ignore_eos` mean what they mean in vLLM.
    `user` is accepted and ignored.
    """

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: Annotated[int | None, BeforeValidator(_off_for_minus_one)] = Field(None, ge=0)
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
        _require_finite(body)
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
        events = (self.diffusion or {}).get("events", False)
        if not isinstance(events, bool):
            raise _refusal("diffusion.events", f"got {json.dumps(events)}; accepted: true or false")
        if events and not self.stream:
            raise _refusal("diffusion.events", "accepted: only with stream set to true")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The answer length asked for, under either of its names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_stream_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_events(self) -> bool:
        """Whether the stream tells what every forward revealed."""
        return bool((self.diffusion or {}).get("events"))

    @property
    def overrides(self) -> dict[str, Any]:
        """Decoding settings of this request."""
        return {name: value for name, value in (self.diffusion or {}).items() if name != "events"}


def _require_encodable(body: dict[str, Any]) -> None:
    """Refuse what JSON can spell but no tokenizer or answer can carry: half a surrogate pair, bottomless nesting."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise _refusal("body", "accepted: valid Unicode, reasonably nested", "invalid_json") from error


def _require_finite(body: dict[str, Any]) -> None:
    """Refuse `NaN`, `Infinity` and what overflows to it, wherever it is: Python's parser reads them, JSON has none."""
    rest: list[tuple[str, Any]] = [("", body)]
    while rest:  # no recursion: a body may be nested deeply
        path, value = rest.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise _refusal(path[1:], f"got {json.dumps(value)}, which JSON does not have; accepted: a finite number")
        if isinstance(value, dict):
            rest += [(f"{path}.{name}", item) for name, item in value.items()]
        if isinstance(value, list):
            rest += [(f"{path}.{index}", item) for index, item in enumerate(value)]


def _is_neutral(name: str, value: object) -> bool:
    # 1 == True in Python, but "logprobs": 0 is not "logprobs": false.
    flag = isinstance(value, bool)
    return any(value == neutral and flag == isinstance(neutral, bool) for neutral in NEUTRAL_VALUES[name])


def _refusal(param: str, reason: str, code: str = "invalid_value") -> PydanticCustomError:
    """An error of the whole body that still names the field at fault."""
    return PydanticCustomError("refusal", "{reason}", {"param": param, "reason": reason, "code": code})
