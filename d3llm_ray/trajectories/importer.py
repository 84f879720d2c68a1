"""Import published distillation data: files in, a finished trajectory folder out, in constant memory.

What the layouts hold, and how a row becomes one of ours, is in `published`.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import Field

from d3llm_ray.config import Settings
from d3llm_ray.errors import InputError, require
from d3llm_ray.models import load_tokenizer, read_configs
from d3llm_ray.output_folder import sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.trajectories.published import ChatTemplate, Imported, PublishedTeacher, import_answer, import_trajectory
from d3llm_ray.trajectories.schema import MAX_CANVAS, build_table, file_metadata
from d3llm_ray.trajectories.shards import ShardWriter, check_errors, check_folder
from d3llm_ray.trajectories.storage import SUCCESS, Location

TRAJECTORY = ("trajectory", "prompt_ids", "final_output", "question", "gt_answer", "llm_answer", "is_correct")
ANSWER = ("question", "llm_response", "gt_answer")
FORMATS = "Parquet (.parquet), JSON Lines (.jsonl, or one .json) or a saved `datasets` folder (.arrow, local)"
BATCH_ROWS = 32  # a published row is 0.4 to 0.8 MB
BUFFER_BYTES = 1 << 20  # one request to a remote storage


class ImportSettings(Settings):
    """Turn published distillation data into trajectory rows: d3LLM's trajectories, or dParallel's plain answers."""

    verb: ClassVar[str] = "trajectories import"

    source: str = Field(
        description="file, or folder of files, any pyarrow.fs path: Parquet, JSON Lines, or a saved `datasets` folder; "
        "with a column trajectory, or with question and llm_response"
    )
    teacher: str = Field(description="zoo name or checkpoint folder of the model that made them, with its tokenizer")
    output: str = Field(description="folder to write, any pyarrow.fs path")
    retemplate: bool = Field(
        True, description="put `question` in the chat template as the prompt; false keeps the published tokens"
    )
    max_tokens: int = Field(256, ge=1, le=MAX_CANVAS, description="response positions of answers without a trajectory")
    max_error_fraction: float = Field(0.05, ge=0.0, le=1.0, description="stop when more rows than this are malformed")
    rows_per_file: int = Field(50_000, ge=1, description="rows of one output file")


@dataclass(frozen=True)
class ImportSource:
    """Opened input: `rows()` yields each row as a mapping of plain values and arrays, or what stands in its place."""

    columns: list[str]
    total: int
    rows: Callable[[], Iterator[Any]]


class Findings:
    """How the published prompts looked, for the summary."""

    def __init__(self) -> None:
        self._forms: Counter[str] = Counter()
        self._inferred = 0
        self._offsets: tuple[int, int] | None = None

    def add(self, imported: Imported) -> None:
        self._forms[imported.form] += 1
        self._inferred += imported.inferred
        low, high = self._offsets or (imported.offset, imported.offset)
        self._offsets = min(low, imported.offset), max(high, imported.offset)

    def figures(self) -> dict[str, Any]:
        """Rows by published prompt: the question's own tokens, templated, neither; the prompt's growth in tokens.

        `inferred`: rows whose prompt_ids were missing or wrong, where the masks told the prompt's end.
        """
        forms = {form: self._forms[form] for form in ("raw", "templated", "other")}
        return {**forms, "inferred": self._inferred, "offset": self._offsets}


@sole_writer
def run(settings: ImportSettings, progress: Progress | None = None) -> str:
    """Import `settings.source` into the folder `settings.output`, laid out as a finished trajectory run; return it.

    A row met twice is kept once. Malformed rows go to `errors.parquet`; `InputError` once they are more than
    `max_error_fraction` of all.
    """
    output = Location.of(settings.output, "output")
    finished = (output / SUCCESS).exists
    require(not finished, "output", settings.output, f"a folder without a finished run ({SUCCESS})")
    check_folder(output)
    source = _open(settings.source)
    convert, metadata = _converter(settings, source.columns)
    writer = ShardWriter(output, metadata, settings.rows_per_file)
    findings, seen, failed, example = Findings(), set[int](), 0, ""
    progress = progress or Progress()
    published, done = source.rows(), 0
    with progress.stage("import", source.total):
        while batch := list(islice(published, BATCH_ROWS)):
            rows = []
            for number, row in enumerate(batch, start=done):
                try:
                    imported = convert(row)
                except InputError as error:
                    failed, example = failed + 1, example or f"row {number}: {error}"
                    writer.reject({"row": number, "error": str(error)})
                    continue
                identity = int(imported.row["prompt_id"], 16)
                if identity not in seen:
                    seen.add(identity)
                    findings.add(imported)
                    rows.append(imported.row)
            writer.write(build_table(rows))
            done += len(batch)
            check_errors(failed, source.total, settings.max_error_fraction, example)
            progress.update(done, errors=failed)
    writer.finish(settings, {"duplicates": done - failed - len(seen), "template": findings.figures()})
    return settings.output


def _converter(settings: ImportSettings, columns: list[str]) -> tuple[Callable[[Any], Imported], dict[str, Any]]:
    """The layout's conversion of one row, and the metadata of the files to be written."""
    shape, family = read_configs(settings.teacher)
    if family.mask_token_id is None:
        raise InputError(f"teacher: {settings.teacher!r} is causal; accepted: a masked-diffusion model (llada, dream)")
    tokenizer = load_tokenizer(settings.teacher, family)
    ordered = "trajectory" in columns
    accepted = "trajectory (d3LLM's layout), or question and llm_response (dParallel's)"
    require(ordered or set(ANSWER[:2]) <= set(columns), "source", f"columns {', '.join(columns)}", accepted)
    text = "a checkpoint with a tokenizer" + (", or retemplate: false" if ordered else "")
    needs_text = settings.retemplate or not ordered
    require(tokenizer is not None or not needs_text, "teacher", settings.teacher, text)
    require("question" in columns or not needs_text, "source", "no column question", "one, or retemplate: false")
    generation = {"imported": True, "teacher": settings.teacher}
    template = None if tokenizer is None else ChatTemplate(tokenizer)
    teacher = PublishedTeacher(
        family, family.mask_token_id, shape.vocab_size, template, generation, settings.retemplate
    )
    metadata = file_metadata(family.name, generation)
    if ordered:
        return partial(import_trajectory, teacher=teacher), metadata
    return partial(import_answer, teacher=teacher, max_tokens=settings.max_tokens), metadata


def _open(name: str) -> ImportSource:
    """Find the files of a source and open them by their ending."""
    location = Location.of(name, "source")
    require(location.exists, "source", name, f"a file or folder that exists: {FORMATS}")
    if location.is_folder:
        kinds = {ending: files for ending in (".parquet", ".jsonl", ".arrow") if (files := location.files(ending))}
        names = f"files {', '.join(kinds)}" if kinds else "no data files"
        require(len(kinds) == 1, "source", f"{name} with {names}", f"a folder of one kind of files: {FORMATS}")
        ((ending, files),) = kinds.items()
    else:
        ending, files = f".{location.path.rpartition('.')[2]}", [location]
        require(ending in _OPENERS, "source", name, FORMATS)
    with _readable(name):
        source = _OPENERS[ending](files)
    require(source.total > 0, "source", f"{name} without rows", "one row or more")

    def rows() -> Iterator[Any]:
        with _readable(name):
            yield from source.rows()

    return replace(source, rows=rows)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"source: cannot read {name!r}: {reason}; accepted: {FORMATS}") from error


def _open_parquet(files: list[Location]) -> ImportSource:
    def read(file: Location) -> Iterator[Any]:
        with file.filesystem.open_input_file(file.path) as stream:
            # Buffered, else a whole row group is read at once.
            parquet = pq.ParquetFile(stream, buffer_size=BUFFER_BYTES)
            for batch in parquet.iter_batches(BATCH_ROWS, columns=_used(parquet.schema_arrow.names)):
                yield from _rows(batch)

    heads = [pq.read_metadata(file.path, filesystem=file.filesystem) for file in files]
    columns = heads[0].schema.to_arrow_schema().names
    return ImportSource(
        columns, sum(head.num_rows for head in heads), lambda: (row for file in files for row in read(file))
    )


def _open_arrow(files: list[Location]) -> ImportSource:
    """Record batches are mapped, not read: `datasets` writes 1,000 rows a batch."""
    local = all(isinstance(file.filesystem, fs.LocalFileSystem) for file in files)
    require(local, "source", files[0].name, "a local folder; Parquet and JSON Lines may be remote")

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            with pa.memory_map(file.path) as stream:
                yield from pa.ipc.open_stream(stream)

    with pa.memory_map(files[0].path) as stream:
        columns = pa.ipc.open_stream(stream).schema.names
    return ImportSource(
        columns,
        sum(batch.num_rows for batch in batches()),
        lambda: (row for batch in batches() for row in _rows(batch.select(_used(columns)))),
    )


def _open_json_lines(files: list[Location]) -> ImportSource:
    def lines() -> Iterator[bytes]:
        for file in files:
            with file.filesystem.open_input_stream(file.path) as stream:
                yield from (line for line in io.BufferedReader(stream, BUFFER_BYTES) if line.strip())

    first = _json(next(lines(), b"{}"))
    accepted = "JSON Lines, one object a line; `jq -c '.[]'` turns an array into them"
    require(isinstance(first, dict), "source", f"{files[0].name} without an object in its first line", accepted)
    return ImportSource(list(first), sum(1 for _ in lines()), lambda: map(_json, lines()))


_OPENERS = {
    ".parquet": _open_parquet,
    ".arrow": _open_arrow,
    ".jsonl": _open_json_lines,
    ".json": _open_json_lines,
}


def _used(columns: list[str]) -> list[str]:
    return [name for name in columns if name in TRAJECTORY or name in ANSWER]


def _json(line: bytes) -> Any:
    """The line's value, or the line itself when it is not JSON: a row that will be refused with what it says."""
    try:
        return json.loads(line)
    except ValueError:
        return line


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows of a record batch one by one, lists of numbers as arrays."""
    for number in range(batch.num_rows):
        yield {name: _value(batch[name][number]) for name in batch.schema.names}


def _value(scalar: pa.Scalar) -> Any:
    if not isinstance(scalar, pa.ListScalar) or scalar.values is None:
        return scalar.as_py()
    if pa.types.is_nested(scalar.values.type):
        return [_value(item) for item in scalar.values]
    return scalar.values.to_numpy(zero_copy_only=False)
