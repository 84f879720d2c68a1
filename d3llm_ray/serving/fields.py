"""What the bodies of all requests have in common: how strict they are, and what is refused with which reason."""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

_GRAMMAR = "tokens are revealed in any order and several at once, which no grammar can constrain yet"
_TOOLS = "a tool call's arguments would have to follow a schema, and " + _GRAMMAR
_COUNTS = "it counts the tokens before a token, and those may be revealed after it"
_BEAM = "answers are not ranked: a diffusion decoder knows no probability of a sequence"
_NOTHING = "this server does nothing of the kind"

# Parameters of OpenAI's and vLLM's APIs that this server cannot honour, with the values that ask for nothing, and why
# any other value is refused. Clients often send the former by default; the latter must not be ignored in silence.
NEUTRAL_VALUES: dict[str, tuple[tuple[object, ...], str]] = {
    "frequency_penalty": ((0,), _COUNTS),
    "presence_penalty": ((0,), _COUNTS),
    "repetition_penalty": ((1,), _COUNTS),
    "logit_bias": (({},), "logits are read as the model gives them"),
    "best_of": ((1,), _BEAM),
    "use_beam_search": ((False,), _BEAM),
    "suffix": (("",), "an answer is decoded behind its prompt; text behind the answer is not read"),
    "response_format": (({"type": "text"},), _GRAMMAR),
    "structured_outputs": ((), _GRAMMAR),
    "guided_json": ((), _GRAMMAR),
    "guided_regex": ((), _GRAMMAR),
    "guided_choice": ((), _GRAMMAR),
    "guided_grammar": ((), _GRAMMAR),
    "tools": (([],), _TOOLS),
    "tool_choice": (("none", "auto"), _TOOLS),
    "parallel_tool_calls": ((True, False), _TOOLS),
    "functions": (([],), _TOOLS),
    "function_call": (("none", "auto"), _TOOLS),
    "modalities": ((["text"],), "the model reads and writes text"),
    "store": ((False,), _NOTHING),
    "metadata": (({},), _NOTHING),
    "service_tier": (("auto", "default"), _NOTHING),
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


def with_neutral(schema: dict[str, Any]) -> None:
    """Add to a body's JSON schema what is accepted of the parameters that cannot be honoured."""
    for name, (neutral, reason) in NEUTRAL_VALUES.items():
        schema["properties"][name] = {"enum": [*neutral, None], "description": f"not supported: {reason}"}


def either(unasked: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """JSON schema: fields of `unasked` are left out or as it says, or else those of `asked` are sent as it says."""
    return {"anyOf": [{"properties": unasked}, {"properties": asked, "required": [*asked]}]}


def message_schema(schema: dict[str, Any]) -> None:
    """What a message looks like: an answer's may lack its content, and has fields that say nothing."""
    fields = schema.pop("properties")
    content, required = fields["content"], schema.pop("required")
    del schema["additionalProperties"]
    empty: dict[str, Any] = {name: {"enum": [None, "", [], {}, False, 0]} for name in EMPTY_MESSAGE_FIELDS}
    common = {"type": "object", "additionalProperties": False}
    others = {"role": {"enum": ["system", "developer", "user"]}, "content": content, **empty}
    answer = {"role": {"const": "assistant"}, "content": {"anyOf": [content, {"type": "null"}]}, **empty}
    schema["anyOf"] = [
        {**common, "properties": others, "required": required},
        {**common, "properties": answer, "required": ["role"]},
    ]


class StrictBody(BaseModel):
    """A body, or a part of one: unknown fields are refused, and `null` is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_sent(cls, body: Any) -> Any:
        return without_nulls(body) if isinstance(body, dict) else body


def without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def without_neutral(body: Any) -> Any:
    """A body without the parameters that cannot be honoured; refuses the first one that asks for something."""
    if not isinstance(body, dict):
        return body
    for name in NEUTRAL_VALUES.keys() & body.keys():
        if body[name] is not None and not _is_neutral(name, body[name]):
            neutral, reason = NEUTRAL_VALUES[name]
            accepted = " or ".join(json.dumps(value) for value in neutral) or "null"
            raise refusal(
                name, f"not supported by this server: {reason}; accepted: {accepted}", "unsupported_parameter"
            )
    return {name: value for name, value in body.items() if name not in NEUTRAL_VALUES}


def sound(body: Any) -> Any:
    """The body itself. Refuses what Python's JSON parser reads, and no tokenizer or answer can carry."""
    if not isinstance(body, dict):
        return body
    try:  # half a surrogate pair, bottomless nesting
        json.dumps(body, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise refusal("body", "accepted: valid Unicode, reasonably nested", "invalid_json") from error
    _require_finite(body)
    return body


def _require_finite(body: dict[str, Any]) -> None:
    """Refuse `NaN`, `Infinity` and what overflows to it, wherever it is: Python's parser reads them, JSON has none."""
    rest: list[tuple[str, Any]] = [("", body)]
    while rest:  # no recursion: a body may be nested deeply
        path, value = rest.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise refusal(path[1:], f"got {json.dumps(value)}, which JSON does not have; accepted: a finite number")
        if isinstance(value, dict):
            rest += [(f"{path}.{name}", item) for name, item in value.items()]
        if isinstance(value, list):
            rest += [(f"{path}.{index}", item) for index, item in enumerate(value)]


def _is_neutral(name: str, value: object) -> bool:
    # 1 == True in Python, but "best_of": true is not "best_of": 1.
    flag = isinstance(value, bool)
    return any(value == neutral and flag == isinstance(neutral, bool) for neutral in NEUTRAL_VALUES[name][0])


def refusal(param: str, reason: str, code: str = "invalid_value") -> PydanticCustomError:
    """An error of the whole body that still names the field at fault."""
    return PydanticCustomError("refusal", "{reason}", {"param": param, "reason": reason, "code": code})
