"""What a task is: prompts, references, and a check of the final answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from d3llm_ray.errors import require, unknown
from d3llm_ray.judging import FinalAnswer, Judge, require_ready

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Message = dict[str, str]


@dataclass(frozen=True)
class Problem:
    """One prompt as chat messages, with the reference answer where there is one.

    `id` is made of the content; `user_id` is what the user calls the row, where it has a name. `text`, where it is not
    None, is the prompt as it is, without a chat template, in place of `messages`. `prefix` is how the answer begins: it
    stands behind the template's assistant header, and is no part of what is decoded.
    """

    id: str
    messages: list[Message]
    reference: str | None = None
    user_id: str | int | float | None = None
    text: str | None = None
    prefix: str = ""


@dataclass(frozen=True)
class Task:
    """A named set of problems, and how an answer to one is judged. `load(split, count)` gives at most `count` problems,
    always the same ones; `stop` are strings that end an answer before them, `judge` says whether it is right."""

    name: str
    load: Callable[[Split, int], Iterable[Problem]]
    judge: Judge = field(default_factory=FinalAnswer)
    stop: tuple[str, ...] = ()

    def problems(self, split: Split = "test", count: int = 500) -> list[Problem]:
        return list(self.stream(split, count))

    def stream(self, split: Split, count: int) -> Iterator[Problem]:
        """The same problems one at a time. `InputError` at once for an unknown split or a count below 1."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        require(count >= 1, "count", count, "a positive whole number")
        return iter(self.load(split, count))

    def check_judge(self) -> None:
        """Raise `InputError` where this machine cannot judge answers: programs need a sandbox."""
        require_ready(self.judge)

    def extract(self, text: str) -> str | None:
        """What of an answer is judged; None where there is nothing."""
        return self.judge.extract(text)

    def is_correct(self, text: str, reference: str) -> bool:
        """Whether an answer is right, by the task's judge."""
        return self.judge.is_correct(text, reference)


def no_problems(_split: Split, _count: int) -> list[Problem]:
    """The problems of a task that only judges answers; a task with it can be sent to any process."""
    return []


def problem_id(messages: list[Message], reference: str | None) -> str:
    """A stable id from the content alone."""
    return hashlib.sha256(json.dumps([messages, reference]).encode()).hexdigest()[:16]
