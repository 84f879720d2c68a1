"""Measurements that are kept, a Parquet file a row of the report: how they are named and read back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d3llm_ray.errors import one_line, require
from d3llm_ray.evaluation.rows import COMPUTED, EvaluatedSample, EvaluationRow, summarise
from d3llm_ray.report import digest, machine, replacing, versions

MOST_LETTERS = 50  # of the readable part of a name, of which a file system takes 255 bytes
ENDING = ".parquet"
OLD_ENDING = ".jsonl"  # of earlier versions
ROW, USER_IDS = b"d3llm_ray.row", b"d3llm_ray.user_ids"  # in the file's metadata
_OF_ROWS = ValueError, TypeError, LookupError, ArithmeticError, AttributeError  # of a row that is not ours
COLUMNS = pa.schema(
    {
        "problem_id": pa.string(),
        "user_id": pa.string(),
        "prompt": pa.string(),
        "text": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "answer": pa.string(),
        "reference": pa.string(),
        "correct": pa.bool_(),
        "tokens": pa.int32(),
        "forwards": pa.int32(),
        "prompt_tokens": pa.int32(),
        "finish_reason": pa.string(),
        "error": pa.string(),
    }
)


def measurement_key(names: Sequence[str], content: Any) -> str:
    """A readable file name, made unique by a hash of `content`, of the versions, and of the machine but for its kernel.

    `content` (JSON) is all else that the figures depend on.
    """
    where = {name: value for name, value in machine().items() if name != "platform"}
    slug = readable("-".join(names))
    return f"{slug}-{digest([list(names), content, versions(), where])}"


def readable(name: str) -> str:
    """Letters, digits and hyphens: the part of a file name that tells people what is in it."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)[:MOST_LETTERS]


def write_row(path: Path, row: EvaluationRow) -> None:
    """A line a sample, in the order of the problems; the row is in the file's metadata. Written as a whole."""
    lines = [asdict(sample) for sample in row.samples]
    named = [line["user_id"] for line in lines]
    metadata = {ROW: json.dumps(row.to_dict())}
    if any(name is not None and name != _storable(name) for name in named):  # a number, half of a surrogate pair
        metadata[USER_IDS] = json.dumps(named)
    columns = {name: [_storable(line[name]) for line in lines] for name in COLUMNS.names}
    columns["user_id"] = [None if name is None else _storable(str(name)) for name in named]
    table = pa.table(columns, schema=COLUMNS.with_metadata(metadata))
    with replacing(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def _storable(value: Any) -> Any:
    """Text that UTF-8 can hold; anything else as it is."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def read_row(path: Path, problem_ids: Sequence[str]) -> EvaluationRow | str:
    """A row that `write_row` has written, of these problems; why it cannot be used where it is damaged or of another
    version."""
    with path.open("rb") as file:
        try:
            return _row(pq.read_table(file), problem_ids)
        except (*_OF_ROWS, pa.ArrowException, OSError) as error:
            return one_line(f"{type(error).__name__}: {error}")


def _row(table: pa.Table, problem_ids: Sequence[str]) -> EvaluationRow:
    require(table.schema.equals(COLUMNS), "columns", table.schema.names, "those of this version")
    metadata = table.schema.metadata
    first, lines = json.loads(metadata[ROW]), table.to_pylist()
    if USER_IDS in metadata:
        lines = [line | {"user_id": name} for line, name in zip(lines, json.loads(metadata[USER_IDS]), strict=True)]
    samples = [
        EvaluatedSample(**line | {"token_ids": None if line["token_ids"] is None else tuple(line["token_ids"])})
        for line in lines
    ]
    labels = {name: value for name, value in first.items() if name not in COMPUTED}
    row = summarise(samples, first["seconds"], **labels)
    ids = [sample.problem_id for sample in samples]
    require(ids == list(problem_ids), "problems", len(ids), f"{len(problem_ids)} and their ids")
    require(row == EvaluationRow(**first), "figures", "others", "those of the samples")
    return row
