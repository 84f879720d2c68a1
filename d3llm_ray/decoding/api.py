"""The offline API: prompts in, texts and decoding figures out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from d3llm_ray.decoding.engine import Engine
from d3llm_ray.decoding.presets import Decoder
from d3llm_ray.decoding.request import Completion, Request
from d3llm_ray.decoding.settings_file import choose_decoder
from d3llm_ray.decoding.text import CommittedText
from d3llm_ray.device import check_device
from d3llm_ray.errors import DecodingError, InputError, require
from d3llm_ray.models import Family, Transformer, encode_chat, load_model, load_tokenizer, read_configs
from d3llm_ray.models.attention import choose_attention
from d3llm_ray.models.chat import check_unicode, encode_text

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class WholePrompt:
    """Chat messages, or a text that goes in without a template; `prefix` is how the answer to it begins."""

    content: str | Messages
    prefix: str = ""


Prompt = str | Messages | Sequence[int] | WholePrompt


class ProgressLike(Protocol):
    """What `generate` needs of a progress display."""

    def update(self, done: int, **figures: Any) -> None: ...


@dataclass(frozen=True)
class Output:
    """The answer to one prompt. Lists over the canvas have one entry for each response position."""

    text: str
    token_ids: list[int]  # before the stop token
    finish_reason: str  # "stop" or "length"; "error" where there is no answer
    prompt_tokens: int
    prompt_ids: list[int]
    forwards: int
    tokens_per_forward: float
    reveal_steps: list[int]
    reveal_entropies: list[float]
    reveal_logprobs: list[float]
    response_ids: list[int]
    error: str | None = None  # why there is no answer; the rest is empty then, and finish_reason "error"

    @staticmethod
    def failed(reason: str, prompt_ids: Sequence[int] = ()) -> Output:
        """What stands for the answer to a prompt that has none."""
        return Output("", [], "error", len(prompt_ids), list(prompt_ids), 0, 0.0, [], [], [], [], reason)


class DiffusionLLM:
    """A model, its tokenizer and an engine.

    llm = DiffusionLLM.from_pretrained("tiny-llada", decoder="d3llm")
    outputs = llm.generate(["Tom has 5 apples. ..."], max_tokens=64)
    slower = llm.generate(["Tom has 5 apples. ..."], max_tokens=64, decoder="vanilla")
    """

    def __init__(self, model: Transformer, family: Family, tokenizer: PreTrainedTokenizerBase | None, engine: Engine):
        self.model, self.family, self.tokenizer, self.engine = model, family, tokenizer, engine

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        decoder: str | Path | Decoder | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        max_batch_size: int = 32,
        attention: str = "auto",
        cuda_graphs: bool | None = None,
        **settings: Any,
    ) -> DiffusionLLM:
        """Load a zoo model or checkpoint folder.

        `decoder`: a preset's name, a decoding settings file or a `Decoder`, None for `default_decoder` of the model's
        family; `settings` override its own.
        `attention`: "auto" takes flash-attn where it is installed on CUDA, "sdpa" or "flash-attn" say which.
        `cuda_graphs` None replays steady-state steps as graphs on CUDA, False never.

        Raises `InputError` for an unknown model, decoder, setting or device, before any weight is read where possible.
        """
        check_device(device)
        family = read_configs(name_or_path)[1]
        chosen = choose_decoder(decoder, family, **settings)
        chosen.check(family)
        backend = choose_attention(attention, torch.device(device))
        model, family = load_model(name_or_path, dtype, device)
        model.use_attention(backend)
        tokenizer = load_tokenizer(name_or_path, family)
        size = len(tokenizer) if tokenizer is not None else None
        engine = Engine(
            model, family, chosen, max_batch_size=max_batch_size, vocabulary_size=size, cuda_graphs=cuda_graphs
        )
        return cls(model, family, tokenizer, engine)

    def decoder(self, chosen: str | Path | Decoder | None = None, /, **settings: Any) -> Decoder:
        """The decoder that `generate` takes when it is called with these."""
        return choose_decoder(self.engine.decoder if chosen is None else chosen, self.family, **settings)

    def encode(self, prompt: Prompt) -> list[int]:
        """`encode_prompt` with the model's tokenizer."""
        return encode_prompt(self.tokenizer, prompt)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        progress: ProgressLike | None = None,
        *,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        decoder: str | Path | Decoder | None = None,
        errors: Literal["raise", "return"] = "raise",
        **settings: Any,
    ) -> list[Output]:
        """Decode every prompt; answers come in the order of `prompts` and do not depend on each other.

        Sampling and stopping are those of `Request`; a `stop` string ends the answer before it, and its text is
        left out. `decoder` (as in `from_pretrained`; None: the one of this object) and `settings` that override its
        own hold for this call, in the same engine and memory. Raises `InputError` before any forward, and
        `DecodingError` for a prompt whose logits are not finite; with `errors="return"` such a prompt costs its own
        answer alone: its `Output` has the reason in `error`.
        """
        require(errors in ("raise", "return"), "errors", errors, "raise or return")
        require(not isinstance(prompts, str), "prompts", prompts, "a list of prompts; for a single text: [text]")
        stops = _check_stops(stop)
        require(not stops or self.tokenizer is not None, "stop", stops, "none: this checkpoint has no tokenizer")
        chosen = self.decoder(decoder, **settings)
        outputs: dict[int, Output] = {}
        requests: dict[int, Request] = {}
        for number, prompt in enumerate(prompts):
            try:
                ids = self.encode(prompt)
                requests[number] = Request(
                    ids, max_tokens, temperature, seed, chosen, top_p, top_k, stop_token_ids, ignore_eos
                )
                self.engine.check(requests[number])
            except InputError as error:
                if errors == "raise":
                    raise InputError(f"prompts[{number}]: {error}") from error
                requests.pop(number, None)
                outputs[number] = Output.failed(str(error))
        index_of = {self.engine.submit(request): index for index, request in requests.items()}
        texts = [CommittedText(self.decode, stops) for _ in prompts] if stops else []
        try:
            while len(outputs) < len(prompts):
                for event in self.engine.step():
                    index = index_of.get(event.request_id)
                    if index is None:
                        continue
                    if event.error is not None:
                        if errors == "raise":
                            raise DecodingError(f"prompts[{index}]: {event.error}")
                        outputs[index] = Output.failed(event.error, requests[index].prompt_ids)
                    completion = event.completion
                    if stops:
                        texts[index].push(event.token_ids)
                        if texts[index].stopped:
                            completion = completion or self.engine.cancel(event.request_id)
                    if completion is not None:
                        outputs[index] = self._output(list(requests[index].prompt_ids), completion)
                        if stops and texts[index].stopped:
                            outputs[index] = _cut(outputs[index], texts[index])
                    if progress is not None and index in outputs:
                        progress.update(len(outputs))
        finally:
            # An interrupted call leaves no request behind in the engine.
            for request_id, index in index_of.items():
                if index not in outputs:
                    self.engine.cancel(request_id)
        return [outputs[index] for index in range(len(prompts))]

    def _output(self, prompt_ids: list[int], completion: Completion) -> Output:
        return Output(
            text=self.decode(completion.token_ids),
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            prompt_tokens=len(prompt_ids),
            prompt_ids=prompt_ids,
            forwards=completion.forwards,
            tokens_per_forward=len(completion.token_ids) / completion.forwards,
            reveal_steps=completion.reveal_steps,
            reveal_entropies=completion.reveal_entropies,
            reveal_logprobs=completion.reveal_logprobs,
            response_ids=completion.response_ids,
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: text becomes one user message, messages go through the chat template, ids stay."""
    if isinstance(prompt, WholePrompt):
        text = prompt.content if isinstance(prompt.content, str) else ""
        start = [] if isinstance(prompt.content, str) else encode_prompt(tokenizer, prompt.content)
        check_unicode(text + prompt.prefix, "prompt")
        return start + encode_text(_known(tokenizer), text + prompt.prefix, control=False)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    token_ids = [item for item in prompt if isinstance(item, int)]
    messages = [item for item in prompt if isinstance(item, dict)]
    if len(token_ids) == len(prompt):
        return token_ids
    if len(messages) != len(prompt):
        raise InputError("prompt: mixed content; accepted: text, a list of chat messages, or a list of token ids")
    return encode_chat(_known(tokenizer), messages)


def _known(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise InputError("prompt: this checkpoint has no tokenizer; accepted: a list of token ids")
    return tokenizer


def _cut(output: Output, text: CommittedText) -> Output:
    """An answer that a stop string ended: its tokens go up to the one that completed the string."""
    ids = output.token_ids[: text.tokens]
    return replace(
        output, text=text.text, token_ids=ids, finish_reason="stop", tokens_per_forward=len(ids) / output.forwards
    )


def _check_stops(stop: Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        require(isinstance(text, str) and bool(text), "stop", text, "strings of one character or more")
    return stops
