"""Bodies of the requests, as far as a diffusion decoder can honour OpenAI's API.

Requests are strict: a field that is not listed here is refused, and so is a value that would have to be ignored.
`null` is the same as leaving a field out, whatever the field: clients write it for all that they do not use.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from d3llm_ray.serving.fields import (
    EMPTY_MESSAGE_FIELDS,
    StrictBody,
    message_schema,
    refusal,
    sound,
    with_neutral,
    without_neutral,
)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
DECODING = CHAT, COMPLETIONS  # routes whose requests need room in the engine
HEALTH = "/health"
READY = "/ready"

MAX_STOPS = 4
MAX_STOP_IDS = 64
MAX_STOP_LENGTH = 256
MAX_MESSAGES = 1024
MAX_CHOICES = 8  # to each prompt
MAX_PROMPTS = 128
MAX_TOP_LOGPROBS, MAX_TEXT_LOGPROBS = 20, 5  # OpenAI's limits, of chats and of completions
MAX_SEED = 2**63 - 1


class TextPart(StrictBody):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


_TEXT_PARTS = TypeAdapter(list[TextPart])


def _join_parts(content: object) -> object:
    """Concatenate `[{"type": "text", "text": ...}, ...]`; leave anything else to the field's own check."""
    if not isinstance(content, list):
        return content
    try:
        return "".join(part.text for part in _TEXT_PARTS.validate_python(content))
    except ValidationError as error:
        raise PydanticCustomError("content_part", "accepted: a string, or a list of parts of type text") from error


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def _as_prompts(prompt: object) -> object:
    """A list of prompts, whichever of OpenAI's four ways it is written in."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt):
        return [prompt]
    if not isinstance(prompt, list) or not 0 < len(prompt) <= MAX_PROMPTS or not _all_alike(prompt):
        accepted = f"accepted: a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either kind"
        raise PydanticCustomError("prompt", "{accepted}", {"accepted": accepted})
    return prompt


def _all_alike(prompts: list[object]) -> bool:
    if all(isinstance(prompt, str) for prompt in prompts):
        return True
    return all(isinstance(prompt, list) and all(type(token) is int for token in prompt) for prompt in prompts)


def _system_for_developer(role: object) -> object:
    return "system" if role == "developer" else role  # OpenAI's newer name for it, which no chat template knows


def _off_for_minus_one(top_k: object) -> object:
    return 0 if type(top_k) is int and top_k == -1 else top_k  # vLLM's older way to say it


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOPS)]
WrittenStops = StopString | StopStrings | None
TopK = Annotated[int, Field(ge=-1)] | None
TextPrompt = Annotated[str, Field(min_length=1)]
IdPrompt = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Several = Field(min_length=1, max_length=MAX_PROMPTS)
WrittenPrompts = TextPrompt | IdPrompt | Annotated[list[TextPrompt], Several] | Annotated[list[IdPrompt], Several]


class Message(StrictBody):
    """One turn of the conversation."""

    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_system_for_developer)]
    content: Annotated[str, BeforeValidator(_join_parts, json_schema_input_type=str | list[TextPart])]

    model_config = ConfigDict(json_schema_extra=message_schema)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_empty(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        said = {name: value for name, value in message.items() if name not in EMPTY_MESSAGE_FIELDS or value}
        if said.get("role") == "assistant" and said.get("content") is None:
            said["content"] = ""  # OpenAI's own type of an answer allows it
        return said


class StreamOptions(StrictBody):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Diffusion(StrictBody):
    """Our extension: how this request is decoded, within the server's bounds."""

    model_config = ConfigDict(extra="allow")

    decoder: str | None = None
    events: bool | None = None
    __pydantic_extra__: dict[str, Any]

    @property
    def overrides(self) -> dict[str, Any]:
        """Settings of the request's decoder."""
        return self.__pydantic_extra__


class GenerationRequest(StrictBody):
    """What the two routes that decode share.

    `diffusion` names a preset for this request, overrides its settings, as `{"decoder": "dparallel",
    "entropy_threshold": 0.3}`, and asks for reveal events in a stream by `{"events": true}`. `top_k` (0 or -1: off),
    `stop_token_ids` and `ignore_eos` mean what they mean in vLLM. `user` is accepted and ignored.
    """

    model_config = ConfigDict(json_schema_extra=with_neutral)
    asks: ClassVar[str]  # the field that holds what is to be answered

    model: str
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: Annotated[int | None, BeforeValidator(_off_for_minus_one, json_schema_input_type=TopK)] = Field(None, ge=0)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_IDS)
    ignore_eos: bool | None = None
    stop: Annotated[StopStrings, BeforeValidator(_as_list, json_schema_input_type=WrittenStops)] = Field([])
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    diffusion: Diffusion | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_whole_body(cls, body: Any) -> Any:
        return without_neutral(sound(body))

    @model_validator(mode="after")
    def _what_only_streams_have(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options", "accepted: only with stream set to true")
        if self.wants_events and not self.stream:
            raise refusal("diffusion.events", "accepted: only with stream set to true")
        return self

    @property
    def answer_length(self) -> tuple[str, int | None]:
        """The field that says how many tokens an answer may have, and what it says."""
        return "max_tokens", self.max_tokens

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return 1

    @property
    def alternatives(self) -> int | None:
        """Tokens whose log probabilities are told beside that of each token; None: not even its own."""
        raise NotImplementedError

    @property
    def wants_stream_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_events(self) -> bool:
        """Whether the stream tells what every forward revealed."""
        return self.diffusion is not None and bool(self.diffusion.events)


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    asks = "messages"

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise refusal("max_tokens", "differs from max_completion_tokens; accepted: one of the two")
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs", "accepted: only with logprobs set to true")
        return self

    @property
    def answer_length(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is None:
            return super().answer_length
        return "max_completion_tokens", self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`: prompts as they are, without a chat template and without anything added.

    `return_token_ids` means what it means in vLLM; a model without a tokenizer always returns them.
    """

    asks = "prompt"

    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts, json_schema_input_type=WrittenPrompts)]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TEXT_LOGPROBS)
    return_token_ids: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.echo and self.logprobs is not None:
            reason = (
                "not supported together with logprobs: a diffusion model predicts masked positions, not each token "
            )
            reason += "from those before it, and has no such probabilities of a prompt; accepted: one of the two"
            raise refusal("echo", reason, "unsupported_parameter")
        return self

    @property
    def prompts(self) -> int:
        return len(self.prompt)

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class TextRequest(StrictBody):
    """What the two routes below share."""

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_whole_body(cls, body: Any) -> Any:
        return sound(body)


class TokenizeRequest(TextRequest):
    """`POST /tokenize`, as in vLLM: a `prompt` as `/v1/completions` reads it, or `messages` with the chat template."""

    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise refusal("prompt", "accepted: either prompt or messages")
        return self


class DetokenizeRequest(TextRequest):
    """`POST /detokenize`, as in vLLM."""

    tokens: list[Annotated[int, Field(ge=0)]]
