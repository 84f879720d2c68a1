"""What a task is: prompts, references, and a check of the final answer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from d3llm_ray.errors import require, unknown

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Message = dict[str, str]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARKED = re.compile(r"####\s*(-?[\d,.]+)")


@dataclass(frozen=True)
class Problem:
    """One prompt as chat messages, with the reference answer where there is one.

    `id` is made of the content; `user_id` is what the user calls the row, where it has a name.
    """

    id: str
    messages: list[Message]
    reference: str | None = None
    user_id: str | int | float | None = None


@dataclass(frozen=True)
class Task:
    """A named set of problems. `load(split, count)` gives at most `count` problems, always the same ones."""

    name: str
    load: Callable[[Split, int], Iterable[Problem]]

    def problems(self, split: Split = "test", count: int = 500) -> list[Problem]:
        return list(self.stream(split, count))

    def stream(self, split: Split, count: int) -> Iterator[Problem]:
        """The same problems one at a time. `InputError` at once for an unknown split or a count below 1."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        require(count >= 1, "count", count, "a positive whole number")
        return iter(self.load(split, count))

    def extract(self, text: str) -> str | None:
        """The final answer of a solution, normalised; None when it has none."""
        return extract_answer(text)

    def is_correct(self, text: str, reference: str) -> bool:
        """Whether a solution ends in the reference answer."""
        answer = extract_answer(text)
        return answer is not None and answer == (extract_answer(reference) or normalise(reference))


def no_problems(_split: Split, _count: int) -> list[Problem]:
    """The problems of a task that only judges answers; a task with it can be sent to any process."""
    return []


def extract_answer(text: str) -> str | None:
    """The final answer: after the last `####` (GSM8K), else in the last `\\boxed{}` (MATH), else the last number."""
    if marked := _MARKED.findall(text):
        return normalise(marked[-1])
    if (boxed := last_boxed(text)) is not None:
        return normalise(boxed)
    numbers = _NUMBER.findall(text)
    return normalise(numbers[-1]) if numbers else None


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` with balanced braces; None when there is none or it never closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for index in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : index]
    return None


def normalise(answer: str) -> str:
    """Compare answers without case, spaces, thousands separators, a final stop or a decimal `.0`."""
    answer = re.sub(r"[\s,$]", "", answer.lower()).rstrip(".")
    return re.sub(r"(\d)\.0+$", r"\1", answer)


def problem_id(messages: list[Message], reference: str | None) -> str:
    """A stable id from the content alone."""
    return hashlib.sha256(json.dumps([messages, reference]).encode()).hexdigest()[:16]
