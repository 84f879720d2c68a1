"""Tasks from files: JSONL or Parquet rows with `messages` or `prompt`, and optionally `reference`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from d3llm_ray.errors import InputError
from d3llm_ray.tasks.task import Message, Problem, problem_id

ENDINGS = (".jsonl", ".parquet")
ACCEPTED = "a .jsonl or .parquet file with a column 'messages' or 'prompt', and optionally 'reference'"


def read_problems(path: str | Path) -> list[Problem]:
    """Read every row of a prompts file; `InputError` names the file, the row and what is wrong."""
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise InputError(f"prompts: cannot read {str(path)!r}; accepted: {ACCEPTED}")
    try:
        rows = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts: cannot read {str(path)!r}: {error}; accepted: {ACCEPTED}") from error
    if not rows:
        raise InputError(f"prompts: {str(path)!r} has no rows; accepted: {ACCEPTED}")
    return [_problem(row, f"prompts: row {number} of {str(path)!r}") for number, row in enumerate(rows, start=1)]


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except pa.ArrowInvalid as error:
        raise InputError(f"prompts: {str(path)!r} is not a Parquet file: {error}") from error
    return rows


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"prompts: line {number} of {str(path)!r} is not JSON: {error}") from error
    return rows


def _problem(row: Any, where: str) -> Problem:
    if not isinstance(row, dict) or (row.get("messages") is None) == (row.get("prompt") is None):
        raise InputError(f"{where}: accepted: exactly one of 'messages' and 'prompt'")
    reference = row.get("reference")
    if reference is not None and not isinstance(reference, str):
        raise InputError(f"{where}: field 'reference' is {type(reference).__name__}; accepted: text")
    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise InputError(
            f"{where}: accepted: 'prompt' as text, or 'messages' as objects with text 'role' and 'content'"
        )
    chat: list[Message] = [{"role": message["role"], "content": message["content"]} for message in messages]
    return Problem(problem_id(chat, reference), chat, reference)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
