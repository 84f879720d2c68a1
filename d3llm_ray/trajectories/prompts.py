"""Prompts of a run, and the ids and seeds that follow from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from d3llm_ray.tasks import Problem


@dataclass(frozen=True)
class Prompt:
    """One prompt of a run. `prompt_id` names the row it leads to, `row` is its 0-based place in the source."""

    row: int
    prompt_id: str
    messages: list[dict[str, str]]
    reference: str | None


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
            yield Prompt(row, row_id, problem.messages, problem.reference)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _identify(messages: Any, generation: str) -> str:
    return hashlib.sha256(f"[{_canonical(messages)},{generation}]".encode()).hexdigest()[:16]
