"""The files of a published dataset, row by row in constant memory: Parquet, JSON Lines, saved `datasets` folders."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from d3llm_ray.errors import InputError, one_line, require
from d3llm_ray.paths import not_uploaded
from d3llm_ray.tasks import Split
from d3llm_ray.trajectories.folders import check_local, data_files
from d3llm_ray.trajectories.storage import Location

TRAJECTORY = ("trajectory", "prompt_ids", "final_output", "question", "gt_answer", "llm_answer", "is_correct")
ANSWER = ("question", "llm_response", "gt_answer")
COLUMNS = {*TRAJECTORY, *ANSWER, "idx", "id"}
FORMATS = "Parquet (.parquet), JSON Lines (.jsonl, or one .json) or a saved `datasets` folder (.arrow, local)"
IN_FOLDERS = (".parquet", ".jsonl", ".arrow")
BATCH_ROWS = 32  # a published row is 0.4 to 0.8 MB
BUFFER_BYTES = 1 << 20  # one request to a remote storage


@dataclass(frozen=True)
class PublishedRows:
    """Opened input: `rows()` yields each row as a mapping of plain values and arrays, or what stands in its place."""

    columns: list[str]
    total: int
    rows: Callable[[], Iterator[Any]]


def open_published(name: str, split: Split, field: str) -> PublishedRows:
    """Find the files of a source (see `data_files`) and open them by their ending. `InputError` names `field`."""
    location = Location.of(name, field)
    check_local(location, field)
    require(location.exists, field, name, f"a file or folder that exists: {FORMATS}{not_uploaded(location.name)}")
    files = data_files(location, IN_FOLDERS, split, field) if location.is_folder else [location]
    kinds = sorted({f".{file.path.rpartition('.')[2]}" for file in files})
    one_kind = f"a folder of one kind of files: {FORMATS}"
    require(len(kinds) == 1, field, f"{name} with files {', '.join(kinds)}", one_kind)
    require(kinds[0] in _OPENERS, field, name, FORMATS)
    for file in files:
        check_local(file, field)
    with _readable(name, field):
        source = _OPENERS[kinds[0]](files, field)
    require(source.total > 0, field, f"{name} without rows", "one row or more")

    def rows() -> Iterator[Any]:
        with _readable(name, field):
            yield from source.rows()

    return replace(source, rows=rows)


@contextmanager
def _readable(name: str, field: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        reason = one_line(error)
        raise InputError(f"{field}: cannot read {name!r}: {reason}; accepted: {FORMATS}") from error


def _open_parquet(files: list[Location], _field: str) -> PublishedRows:
    def read(file: Location) -> Iterator[Any]:
        with file.filesystem.open_input_file(file.path) as stream:
            # Buffered, else a whole row group is read at once.
            parquet = pq.ParquetFile(stream, buffer_size=BUFFER_BYTES)
            for batch in parquet.iter_batches(BATCH_ROWS, columns=_used(parquet.schema_arrow.names)):
                yield from _rows(batch)

    heads = [pq.read_metadata(file.path, filesystem=file.filesystem) for file in files]
    columns = heads[0].schema.to_arrow_schema().names
    return PublishedRows(
        columns, sum(head.num_rows for head in heads), lambda: (row for file in files for row in read(file))
    )


def _open_arrow(files: list[Location], field: str) -> PublishedRows:
    """Record batches are mapped, not read: `datasets` writes 1,000 rows a batch."""
    local = all(isinstance(file.filesystem, fs.LocalFileSystem) for file in files)
    require(local, field, files[0].name, "a local folder; Parquet and JSON Lines may be remote")

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            with pa.memory_map(file.path) as stream:
                yield from pa.ipc.open_stream(stream)

    with pa.memory_map(files[0].path) as stream:
        columns = pa.ipc.open_stream(stream).schema.names
    return PublishedRows(
        columns,
        sum(batch.num_rows for batch in batches()),
        lambda: (row for batch in batches() for row in _rows(batch.select(_used(columns)))),
    )


def _open_json_lines(files: list[Location], field: str) -> PublishedRows:
    def lines() -> Iterator[bytes]:
        for file in files:
            with file.filesystem.open_input_stream(file.path) as stream:
                yield from (line for line in io.BufferedReader(stream, BUFFER_BYTES) if line.strip())

    first = _json(next(lines(), b"{}"))
    accepted = "JSON Lines, one object a line; `jq -c '.[]'` turns an array into them"
    require(isinstance(first, dict), field, f"{files[0].name} without an object in its first line", accepted)
    return PublishedRows(list(first), sum(1 for _ in lines()), lambda: map(_json, lines()))


_OPENERS = {
    ".parquet": _open_parquet,
    ".arrow": _open_arrow,
    ".jsonl": _open_json_lines,
    ".json": _open_json_lines,
}


def _used(columns: list[str]) -> list[str]:
    return [name for name in columns if name in COLUMNS]


def _json(line: bytes) -> Any:
    """The line's value, or the line itself when it is not JSON: a row that will be refused with what it says."""
    try:
        return json.loads(line)
    except ValueError:
        return line


def _rows(batch: pa.RecordBatch) -> Iterator[Any]:
    """The rows of a record batch one by one, lists of numbers as arrays."""
    for number in range(batch.num_rows):
        try:
            yield {name: _value(batch[name][number]) for name in batch.schema.names}
        except UnicodeDecodeError as error:  # what stands in the row's place is refused with what it says
            yield f"text that is not UTF-8: {error}"


def _value(scalar: pa.Scalar) -> Any:
    if not isinstance(scalar, pa.ListScalar) or scalar.values is None:
        return scalar.as_py()
    if pa.types.is_nested(scalar.values.type):
        return [_value(item) for item in scalar.values]
    return scalar.values.to_numpy(zero_copy_only=False)
