"""The trajectory row: how a teacher decoded one prompt, in about one kilobyte.

The published layout stores the whole sequence after every step (0.4 MB a row). All it says about the order, the
pseudo-trajectory of arXiv:2601.07568, is one number per response position, the step that revealed it; that is what a
row holds here. Positions are relative to the start of the response, so the row stays valid under any chat template.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from d3llm_ray import __version__
from d3llm_ray.errors import InputError
from d3llm_ray.trajectories.storage import SUCCESS, Location


def _list(values: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", values))  # the name that Parquet gives to list items


TrajectoryRow = dict[str, Any]  # column -> value, of a row while it is made; of a failed prompt with `error`
MESSAGES = _list(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))
METADATA_KEY = b"d3llm_ray"

# Null in imported rows, whose layout does not tell: reveal_entropy, attempt, temperature, seed. Null in answers that
# were imported without an order: reveal_step and forwards as well.
SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),  # 16 hexadecimal digits, see `prompts.prompt_id`
        pa.field("messages", MESSAGES),  # null where the prompt is known by its token ids only
        pa.field("prompt_ids", _list(pa.int32()), nullable=False),
        pa.field("response_ids", _list(pa.int32()), nullable=False),  # the canvas: stop token and padding included
        pa.field("reveal_step", _list(pa.uint16())),  # per canvas position: 0-based forward
        pa.field("reveal_entropy", _list(pa.float16())),  # per canvas position: nats when it was revealed
        pa.field("reference", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("is_correct", pa.bool_()),  # null without a reference
        pa.field("attempt", pa.int8()),  # 0-based rung of the temperature ladder
        pa.field("temperature", pa.float32()),
        pa.field("forwards", pa.int32()),  # model forwards of this attempt
        pa.field("seed", pa.int64()),  # of this attempt: the row can be decoded again by itself
        pa.field("reference_ids", _list(pa.int32())),  # the training set's response, without a stop token
    ]
)
MAX_CANVAS = 2**16  # reveal_step is uint16

# A prompt or source row that gave no trajectory. Null where it is unknown or makes no sense.
ERROR_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # 0-based place in the source
        pa.field("prompt_id", pa.string()),
        pa.field("messages", MESSAGES),
        pa.field("reference", pa.string()),
        pa.field("error", pa.string(), nullable=False),  # the reason, one line
    ]
)
ERRORS = "errors.parquet"


def build_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema = SCHEMA) -> pa.Table:
    """Rows as a table of exactly `schema`; an absent key is null. Raises `ValueError` for one that has no column."""
    columns = set(schema.names)
    for row in rows:
        if not row.keys() <= columns:
            raise ValueError(f"row has unknown columns: {sorted(row.keys() - columns)}")
    return pa.Table.from_pylist(list(rows), schema=schema)


def check_table(table: pa.Table, source: str) -> None:
    """Raise `InputError` unless `table` has the schema and its lists agree with each other."""
    for field in SCHEMA:
        if field.name not in table.schema.names:
            raise InputError(f"{source}: column {field.name!r} is missing; accepted: {', '.join(SCHEMA.names)}")
        kind = table.schema.field(field.name).type
        if kind != field.type:
            raise InputError(f"{source}: column {field.name!r} is {kind}; accepted: {field.type}")
        if not field.nullable and table[field.name].null_count:
            raise InputError(f"{source}: column {field.name!r} holds nulls; accepted: a value in every row")
    canvas = pc.list_value_length(table["response_ids"])
    for name in ("reveal_step", "reveal_entropy"):
        if not _all(pc.equal(pc.list_value_length(table[name]), canvas)):
            raise InputError(f"{source}: {name} and response_ids differ in length; accepted: one entry a position")
    for name, needed in (("forwards", "reveal_step"), ("reveal_step", "forwards"), ("reveal_entropy", "reveal_step")):
        if not _all(pc.or_(pc.is_null(table[name]), pc.is_valid(table[needed]))):
            raise InputError(f"{source}: a row has {name} but no {needed}; accepted: rows with both")
    steps = table["reveal_step"].combine_chunks()
    forwards = table["forwards"].combine_chunks().take(pc.list_parent_indices(steps))
    if not _all(pc.less(pc.list_flatten(steps), forwards)):
        raise InputError(f"{source}: a reveal_step is not below its row's forwards; accepted: 0-based forwards")


def _all(flags: pa.Array | pa.ChunkedArray) -> bool:
    """Whether no flag is false; nulls (absent lists) and emptiness count as true."""
    return pc.all(flags).as_py() is not False


def read_trajectories(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """Read a finished trajectory folder, or one Parquet file of it, from any `pyarrow.fs` path.

    The table's schema metadata is the files' (see `read_metadata`). `columns` None reads and checks every column.
    Raises `InputError` for a path that is missing, unfinished or of another schema.
    """
    dataset = open_dataset(path)
    if columns is not None:
        for name in columns:
            if name not in SCHEMA.names:
                raise InputError(f"columns: unknown value {name!r}; accepted: {', '.join(SCHEMA.names)}")
        return dataset.to_table(columns=list(columns))
    table = dataset.to_table()
    check_table(table, os.fspath(path))
    return table


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What produced a trajectory folder or file: teacher, family, decoder settings, package version."""
    return decode_metadata(open_dataset(path).schema)


def file_metadata(family: str, generation: Mapping[str, Any]) -> dict[str, Any]:
    """What files say of their rows: the teacher's family, this package, and the generation settings."""
    return {"family": family, "package": "d3llm-ray", "version": __version__, **generation}


def with_metadata(schema: pa.Schema, values: Mapping[str, Any]) -> pa.Schema:
    """`schema` with `values` (JSON-serialisable) as file metadata."""
    return schema.with_metadata({METADATA_KEY: json.dumps(values, sort_keys=True).encode()})


def decode_metadata(schema: pa.Schema) -> dict[str, Any]:
    """The inverse of `with_metadata`; empty for a file without it."""
    values: dict[str, Any] = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
    return values


def open_dataset(path: str | os.PathLike[str]) -> pads.Dataset:
    """The rows of a finished trajectory folder or file, unread; `InputError` as of `read_trajectories`."""
    location = Location.of(path, "trajectories")
    if not location.exists:
        raise InputError(f"trajectories: {os.fspath(path)!r} does not exist; accepted: a trajectory folder or file")
    if location.is_folder and not (location / SUCCESS).exists:
        raise InputError(f"trajectories: {os.fspath(path)!r} has no {SUCCESS}; accepted: the folder of a finished run")
    files = location.files(".parquet") if location.is_folder else [location]
    files = [file for file in files if not file.path.endswith(f"/{ERRORS}")]
    try:
        return pads.dataset([file.path for file in files], filesystem=location.filesystem, format="parquet")
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"trajectories: {os.fspath(path)!r} is not Parquet: {error}") from error
