"""A model that answers from a table and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from d3llm_ray.decoding import DiffusionLLM, Output, decoder
from d3llm_ray.tasks import Problem


class FakeLLM(DiffusionLLM):
    """Answers from a table: prompt -> (text, tokens, forwards), or the reason why there is no answer."""

    def __init__(self, answers: Mapping[str, tuple[str, int, int] | str]) -> None:
        self.answers, self.calls = answers, []
        self.engine = SimpleNamespace(decoder=decoder("d3llm"), max_batch_size=32)
        self.family = SimpleNamespace(name="fake")
        self.tokenizer = None
        self.model = SimpleNamespace(embed_tokens=SimpleNamespace(weight=torch.zeros(1)))

    def generate(self, prompts: Sequence[Any], progress: Any = None, **options: Any) -> list[Output]:
        self.calls.append((len(prompts), options))
        return [self._answer(self.answers[prompt[-1]["content"]]) for prompt in prompts]

    def _answer(self, answer: tuple[str, int, int] | str) -> Output:
        if isinstance(answer, str):
            return Output.failed(answer)
        text, tokens, forwards = answer
        figures = (forwards, tokens / forwards, [0] * 64, [0.0] * 64, [0.0] * 64, [7] * 64)
        return Output(text, [7] * tokens, "stop", 5, [1] * 5, *figures)


def problem(question: str, reference: str | None, name: str | None = None) -> Problem:
    return Problem(question, [{"role": "user", "content": question}], reference, name)
