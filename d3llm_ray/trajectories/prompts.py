"""Prompts of a run, and the ids and seeds that follow from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from d3llm_ray.errors import InputError, one_line
from d3llm_ray.models.chat import check_unicode
from d3llm_ray.tasks import Problem


@dataclass(frozen=True)
class Prompt:
    """One prompt of a run. `prompt_id` names the row it leads to, `row` is its 0-based place in the source.

    A prompt with an `error` cannot be decoded; it goes through the run as those do that fail there.
    """

    row: int
    prompt_id: str
    messages: list[dict[str, str]]
    reference: str | None
    id: str | None = None  # what the source calls it
    error: str | None = None


def prompt_id(messages: list[dict[str, str]] | list[int], generation: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of SHA-256 over the prompt (messages, or token ids) and the generation settings."""
    return _identify(messages, _canonical(generation))


def attempt_seed(seed: int, row_id: str, attempt: int) -> int:
    """The seed of one attempt at one row, in [0, 2**63): the same whoever decodes it, in whatever order."""
    digest = hashlib.sha256(f"{seed}/{row_id}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def distinct_prompts(problems: Iterable[Problem], generation: Mapping[str, Any]) -> Iterator[Prompt]:
    """Prompts with their ids, in order; a prompt that comes twice is one row, and the first one's reference holds."""
    settings, seen = _canonical(generation), set[int]()
    for row, problem in enumerate(problems):
        row_id = _identify(problem.messages, settings)
        number = int(row_id, 16)
        if number not in seen:
            seen.add(number)
            yield _prompt(row, row_id, problem)


def _prompt(row: int, row_id: str, problem: Problem) -> Prompt:
    """A prompt that can be written: half of a surrogate pair, which cannot, is spelled out and is its error."""
    reference = problem.reference and writable(problem.reference)
    user_id = None if problem.user_id is None else writable(str(problem.user_id))
    try:
        for number, message in enumerate(problem.messages):
            check_unicode(message["role"] + message["content"], f"messages.{number}")
        check_unicode(problem.reference or "", "reference")
    except InputError as error:
        messages = [{key: writable(text) for key, text in message.items()} for message in problem.messages]
        return Prompt(row, row_id, messages, reference, user_id, str(error))
    return Prompt(row, row_id, problem.messages, reference, user_id)


def reason_of(error: Exception) -> str:
    """Why a prompt or source row gave no trajectory, in one line that can be written."""
    text = one_line(error)
    return writable(text if isinstance(error, InputError) else f"{type(error).__name__}: {text}")


def writable(text: str) -> str:
    """`text` with every half of a surrogate pair as its escape."""
    return text.encode(errors="backslashreplace").decode()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _identify(messages: Any, generation: str) -> str:
    return hashlib.sha256(f"[{_canonical(messages)},{generation}]".encode()).hexdigest()[:16]
