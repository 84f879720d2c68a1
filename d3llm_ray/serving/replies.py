"""Bodies of the answers of the OpenAI API, with what a diffusion decoder has to add."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    """Token counts; `completion_tokens` are those before the stop token, `tpf` = completion_tokens / forwards.

    `forwards` counts the model calls in which the request took part, prefill and refreshes included. Of several
    answers, tokens and forwards are added up, and every prompt counts once.
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


class TopLogprob(BaseModel):
    """A token that might have been revealed; `bytes` is null where it is a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer: `logprob` is of the forward that revealed it, before temperature and filters.

    Tokens are revealed several at once and in any order: their log probabilities do not add up to a sequence's.
    """

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class Choice(BaseModel):
    index: int = 0
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChoiceLogprobs | None = None


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
    logprobs: ChoiceLogprobs | None = None


class Revealed(BaseModel):
    """What one forward revealed on a request's canvas, whose response positions count from 0.

    `text` and `entropy` (nats) have one entry for each of `positions`. Of the canvas's `size` positions, those before
    `opened` may be decoded (their blocks exist) and those before `frozen` have keys and values that stay as they are.
    """

    forward: int  # 0-based
    positions: list[int]
    text: list[str]
    entropy: list[float]
    size: int
    block_size: int
    opened: int
    frozen: int


class ChatChunk(BaseModel):
    """One event of a stream; `delta.content` extends the text sent so far and never rewrites it.

    `diffusion` is there where the request asks for events: one chunk a forward, with or without text.
    """

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    diffusion: Revealed | None = None


class TextLogprobs(BaseModel):
    """Log probabilities of a completion, defined as in `TokenLogprob`; `text_offset` counts characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One answer of a completion, or in a stream what it grows by."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: TextLogprobs | None = None
    token_ids: list[int] | None = None


class TextCompletion(BaseModel):
    """The answer of `POST /v1/completions` without `stream`; choice `i * n + j` is the j-th answer to prompt i."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class TextChunk(BaseModel):
    """One event of a completion's stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    diffusion: Revealed | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every error answers."""

    error: ErrorDetail


class TokenizedText(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizedText(BaseModel):
    prompt: str


class Version(BaseModel):
    version: str


class Status(BaseModel):
    status: Literal["ok", "ready"]


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
    decoders: list[str]  # what a request may name as its `diffusion.decoder`
    settings_by_decoder: dict[str, dict[str, Any]]  # of each of them, as `decoder_settings` are the server's own
    parent: str | None = None  # an adapter's base
    adapter: str | None = None  # the one that decodes now


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
