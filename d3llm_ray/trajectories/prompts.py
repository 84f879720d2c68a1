"""Where prompts come from, and the ids and seeds that follow from them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyarrow import fs

from d3llm_ray.errors import InputError, require
from d3llm_ray.tasks import EMBEDDED, Problem, Split, Task, load_task
from d3llm_ray.trajectories.storage import Location

EMBEDDED_COUNT = 2000  # an embedded task is endless


@dataclass(frozen=True)
class Prompt:
    """One prompt of a run. `prompt_id` names the row it leads to."""

    prompt_id: str
    messages: list[dict[str, str]]
    reference: str | None


def prompt_id(messages: list[dict[str, str]], generation: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of SHA-256 over the prompt and the generation settings."""
    content = json.dumps([messages, generation], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def attempt_seed(seed: int, row_id: str, attempt: int) -> int:
    """The seed of one attempt at one row, in [0, 2**63): the same whoever decodes it, in whatever order."""
    digest = hashlib.sha256(f"{seed}/{row_id}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def read_prompts(source: str | list[str], split: Split, count: int | None) -> tuple[list[Problem], Task]:
    """Problems of a task, file (any `pyarrow.fs` path) or list of texts, and the task that judges answers.

    The returned task has no problems of its own, so that it can be sent to every actor. Raises `InputError` for
    an unknown task, an unreadable or empty file, a missing or mistyped column.
    """
    if isinstance(source, list):
        require(len(source) > 0, "prompts", source, "one text or more")
        problems = [Problem(str(number), [{"role": "user", "content": text}]) for number, text in enumerate(source)]
        return problems[:count], Task("prompts", _no_problems)
    if source in EMBEDDED:
        task = EMBEDDED[source]
        return task.problems(split, count or EMBEDDED_COUNT), replace(task, load=_no_problems)
    task = _load_file(source)
    return task.problems(split, count or _EVERYTHING), replace(task, load=_no_problems)


_EVERYTHING = 2**63 - 1


def _no_problems(_split: Split, _count: int) -> list[Problem]:
    return []


def _load_file(source: str) -> Task:
    if "://" not in source:
        return load_task(source)
    location = Location.of(source, "prompts")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / location.path.rpartition("/")[2]
        try:
            fs.copy_files(location.path, str(copy), location.filesystem, fs.LocalFileSystem())
        except OSError as error:
            raise InputError(f"prompts: cannot read {source!r}: {error}; accepted: a readable prompts file") from error
        return load_task(str(copy))


def distinct_prompts(problems: Iterable[Problem], generation: Mapping[str, Any]) -> list[Prompt]:
    """Prompts with their ids, in order; a prompt that comes twice is one row, and the first one's reference holds."""
    prompts: dict[str, Prompt] = {}
    for problem in problems:
        row_id = prompt_id(problem.messages, generation)
        prompts.setdefault(row_id, Prompt(row_id, problem.messages, problem.reference))
    return list(prompts.values())
