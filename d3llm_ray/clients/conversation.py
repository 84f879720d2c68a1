"""A conversation with a served model: its messages, what the next request asks, and an answer as it streams in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import yaml

from d3llm_ray.errors import InputError
from d3llm_ray.yaml_file import parse_yaml

OF_REQUEST = ("max_tokens", "temperature", "top_p", "top_k", "seed")  # every other name is the decoder's
_OURS = ("top_k",)  # not among the arguments of the openai package


@dataclass
class StreamedAnswer:
    """One answer; iterate over it once. Each item is new text (which may be empty) and a reveal event or None."""

    stream: openai.Stream[Any]
    text: str = ""
    usage: Any = None
    finish_reason: str | None = None

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        for chunk in self.stream:
            self.usage = chunk.usage or self.usage
            for choice in chunk.choices:
                self.finish_reason = choice.finish_reason or self.finish_reason
            new = "".join(choice.delta.content or "" for choice in chunk.choices)
            self.text += new
            yield new, (chunk.model_extra or {}).get("diffusion")


@dataclass
class Conversation:
    """Messages so far, and the settings of the next request. `watch` asks for reveal events."""

    client: openai.OpenAI
    model: str
    system: str | None
    watch: bool
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    @contextmanager
    def answering(self, text: str) -> Iterator[StreamedAnswer]:
        """Ask, and remember question and answer: of one that was stopped, what has come of it."""
        question = {"role": "user", "content": text}
        answer = StreamedAnswer(self._ask(question))
        try:
            yield answer
        finally:
            answer.stream.close()  # the server notices and frees the slot
            if answer.text:
                self.messages += [question, {"role": "assistant", "content": answer.text}]

    def clear(self) -> None:
        """Forget what was said."""
        self.messages = []

    def set(self, name: str, value: str) -> None:
        """Change a setting of the requests to come; an empty `value` is the server's own. `InputError` for no JSON."""
        try:
            parsed = parse_yaml(value) if value else None
            json.dumps(parsed, allow_nan=False)
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise InputError(f"{name}: got {value!r}; accepted: a number, true, false, null or a name") from error
        self.options = {known: kept for known, kept in self.options.items() if known != name}
        if parsed is not None:
            self.options[name] = parsed

    def _ask(self, question: dict[str, str]) -> openai.Stream[Any]:
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        extra = {name: value for name, value in self.options.items() if name in _OURS}
        diffusion = {name: value for name, value in self.options.items() if name not in OF_REQUEST}
        if self.watch:
            diffusion["events"] = True
        messages: list[Any] = [*before, *self.messages, question]
        stream: openai.Stream[Any] = self.client.chat.completions.create(
            model=self.model,
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra | ({"diffusion": diffusion} if diffusion else {}),
            **{name: self.options[name] for name in OF_REQUEST if name in self.options and name not in _OURS},
        )
        return stream
