"""Tasks from files: JSONL (also gzip'd) or Parquet rows of one prompt and, optionally, its reference answer."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from d3llm_ray.errors import InputError, one_line
from d3llm_ray.paths import expanded, not_uploaded
from d3llm_ray.tasks.task import Message, Problem, problem_id

if TYPE_CHECKING:
    from pyarrow import fs

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
PROMPTS = ("messages", "prompt", "question")
REFERENCES = ("reference", "gt_answer", "answer")  # GSM8K's `answer` is a solution; `Task.is_correct` reads its ####
ONE_PROMPT = "exactly one of 'messages', 'prompt' and 'question'"
ACCEPTED = (
    f"a .jsonl, .jsonl.gz or .parquet file with {ONE_PROMPT}, and optionally 'reference', 'gt_answer' or 'answer'"
)
USER_ID = "id"  # optional: text or a number, which comes back with the answer
BUFFER_BYTES = 1 << 20  # one request to a remote storage
BATCH_ROWS = 256


def read_problems(path: str | os.PathLike[str]) -> list[Problem]:
    """All problems of a local file, in order; `InputError` names the file, the row and what is wrong."""
    from pyarrow import fs

    name = expanded(path, "prompts")
    problems = list(stream_problems(fs.LocalFileSystem(), os.path.abspath(name), name))
    if not problems:
        raise no_rows(name)
    return problems


def stream_problems(filesystem: fs.FileSystem, path: str, name: str) -> Iterator[Problem]:
    """The problems of one file, row by row in constant memory; `name` is what errors call it.

    Raises `InputError` when the file is not readable, not what its ending says, or at the first malformed row.
    """
    if not path.endswith(ENDINGS):
        raise unreadable(name, "unknown ending")
    rows = _parquet if path.endswith(".parquet") else _jsonl
    try:
        for where, row in rows(filesystem, path, name):
            yield to_problem(row, f"prompts: {where} of {name!r}")
    except OSError as error:
        raise unreadable(name, error) from error


def unreadable(name: str, why: object) -> InputError:
    """The error for prompts that cannot be read, in one line."""
    return InputError(f"prompts: cannot read {name!r}: {one_line(why)}; accepted: {ACCEPTED}{not_uploaded(name)}")


def no_rows(name: str) -> InputError:
    """The error for a source without a single prompt."""
    return InputError(f"prompts: {name!r} has no rows; accepted: {ACCEPTED}")


def stem(name: str) -> str:
    """The name of a file or folder without its path and ending."""
    base = name.rstrip("/").rpartition("/")[2]
    for ending in ENDINGS:
        base = base.removesuffix(ending)
    return base


def _parquet(filesystem: fs.FileSystem, path: str, name: str) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with filesystem.open_input_file(path) as stream:
            # Else a whole row group is read at once.
            file = pq.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
            used = [column for column in file.schema_arrow.names if column in (*PROMPTS, *REFERENCES, USER_ID)]
            batches = file.iter_batches(BATCH_ROWS, columns=used or None)
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
                yield f"row {number}", row
    except pa.ArrowInvalid as error:
        raise unreadable(name, f"not Parquet: {error}") from error


def _jsonl(filesystem: fs.FileSystem, path: str, name: str) -> Iterator[tuple[str, Any]]:
    with filesystem.open_input_stream(path) as stream:  # decompresses by the ending
        for number, line in enumerate(io.BufferedReader(stream, BUFFER_BYTES), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # also text that is not UTF-8
                raise InputError(f"prompts: line {number} of {name!r} is not JSON: {error}") from error
            yield f"line {number}", row


def to_problem(row: Any, where: str) -> Problem:
    """One row as a problem; `InputError` starts with `where` and names the columns that are accepted.

    The prompt is the one column of `PROMPTS` that is not null. The reference is the first column of `REFERENCES`
    that the row has, even if null: `answer` is not the reference of a row with a column `reference`. Empty is none.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where} is {type(row).__name__}; accepted: an object with {ONE_PROMPT}")
    prompts = [column for column in PROMPTS if row.get(column) is not None]
    if len(prompts) != 1:
        raise InputError(f"{where} has {_listed(prompts or row)}; accepted: {ONE_PROMPT}")
    reference_column = next((column for column in REFERENCES if column in row), "reference")
    reference = row.get(reference_column)
    if reference is not None and not isinstance(reference, str):
        raise InputError(f"{where}: field {reference_column!r} is {type(reference).__name__}; accepted: text")
    content = row[prompts[0]]
    messages = content if prompts[0] == "messages" else [{"role": "user", "content": content}]
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise InputError(
            f"{where}: field {prompts[0]!r}; accepted: 'prompt' or 'question' as text, or 'messages' as objects "
            "with text 'role' and 'content'"
        )
    chat: list[Message] = [{"role": message["role"], "content": message["content"]} for message in messages]
    return Problem(problem_id(chat, reference or None), chat, reference or None, _user_id(row.get(USER_ID)))


def _user_id(value: Any) -> str | int | float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if number or isinstance(value, str) else None


def _listed(columns: Any) -> str:
    names = ", ".join(repr(column) for column in list(columns)[:10])
    return f"the columns {names}" if names else "no column"


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
