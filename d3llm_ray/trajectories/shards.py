"""Writing a finished trajectory folder piece by piece: rows as they come, in few files, with their totals."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from pyarrow import fs

from d3llm_ray.config import Settings, to_yaml
from d3llm_ray.errors import NAMED, InputError, first_failures
from d3llm_ray.output_folder import named
from d3llm_ray.report import check_output
from d3llm_ray.trajectories.schema import ERROR_SCHEMA, ERRORS, SCHEMA, build_table, check_table, with_metadata
from d3llm_ray.trajectories.storage import LEFTOVER, STARTED, SUCCESS, Location

STAGING, STAGED = "_staging", {"prompts", "parts", "remaining", "manifest.json"}  # what is half done, and its parts
SHARD = re.compile(r"trajectories-\d{5,}\.parquet")


class ShardWriter:
    """Rows to `trajectories-00000.parquet` and on, `rows_per_file` each; memory holds one file's rows.

    `keep` "correct" leaves out rows whose answer is wrong; one that could not be checked stays.

    Every file is complete under its name or absent; the folder counts as finished when `finish` has set its marker.
    `InputError` for a folder that is not ours, see `check_folder`.
    """

    def __init__(self, folder: Location, metadata: Mapping[str, Any], rows_per_file: int, keep: Keep = "all") -> None:
        self.totals = Totals()
        self.errors: list[dict[str, Any]] = []
        self._folder, self._rows_per_file, self._keep = folder, rows_per_file, keep
        self._schema = with_metadata(SCHEMA, metadata)
        self._buffer: list[pa.Table] = []
        self._buffered = self._kept = 0
        self._files: list[Location] = []
        check_folder(folder)
        folder.make_folder()
        (folder / STARTED).write_text("")

    def write(self, rows: pa.Table) -> None:
        """Append rows of `SCHEMA`; `InputError` for rows that contradict themselves."""
        check_table(rows, self._folder.name)
        self.totals.add(rows)
        if self._keep == "correct":
            rows = rows.filter(pc.fill_null(rows["is_correct"], True))
        self._buffer.append(rows)
        self._buffered += rows.num_rows
        self._kept += rows.num_rows
        while self._buffered >= self._rows_per_file:
            self._write_file(self._rows_per_file)

    def reject(self, error: Mapping[str, Any]) -> None:
        """Note a prompt or source row (a mapping of `ERROR_SCHEMA`) that gave no trajectory."""
        self.errors.append(dict(error))

    def finish(self, settings: Settings, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Write what is left, the errors, the summary and, last, the marker; returns the summary.

        What an earlier, interrupted attempt has left and this one has not written again is removed, and nothing else.
        """
        if self._buffered or not self._files:
            self._write_file(self._buffered)
        errors = self._folder / ERRORS
        if self.errors:
            errors.write_table(build_table(self.errors, ERROR_SCHEMA))
        kept = {file.path for file in self._files} | ({errors.path} if self.errors else set())
        files = [self._folder / name for name in self._folder.names() if SHARD.fullmatch(name) or name == ERRORS]
        stale = [file for file in files if file.path not in kept]
        for file in [*stale, *self._folder.leftovers()]:
            file.remove()
        summary = {**self.totals.figures(), "kept": self._kept, "errors": len(self.errors), **figures}
        size = sum(file.info.size for file in self._files)
        summary["bytes_per_row"] = round(size / max(1, self._kept))
        (self._folder / "settings.yaml").write_text(to_yaml(settings))
        (self._folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        (self._folder / SUCCESS).write_text("")
        (self._folder / STARTED).remove()
        return summary

    def _write_file(self, count: int) -> None:
        rows = pa.concat_tables(self._buffer) if self._buffer else SCHEMA.empty_table()
        file = self._folder / f"trajectories-{len(self._files):05d}.parquet"
        file.write_table(rows.slice(0, count).replace_schema_metadata(self._schema.metadata))
        self._files.append(file)
        self._buffer, self._buffered = [rows.slice(count)], rows.num_rows - count


class Totals:
    """Counts over tables of rows, added up one by one."""

    def __init__(self) -> None:
        self.rows = 0
        self._counts: Counter[str] = Counter()
        self._correct_at: Counter[int] = Counter()

    def add(self, rows: pa.Table) -> None:
        self.rows += rows.num_rows
        correct = pc.fill_null(rows["is_correct"], False)
        self._counts["judged"] += rows.num_rows - rows["is_correct"].null_count
        self._counts["correct"] += pc.sum(correct).as_py() or 0
        self._counts["retried"] += pc.sum(pc.greater(rows["attempt"], 0)).as_py() or 0
        self._counts["ordered"] += rows.num_rows - rows["forwards"].null_count
        self._counts["forwards"] += pc.sum(rows["forwards"]).as_py() or 0
        self._counts["response_tokens"] += pc.sum(pc.list_value_length(rows["response_ids"])).as_py() or 0
        self._counts["prompt_tokens"] += pc.sum(pc.list_value_length(rows["prompt_ids"])).as_py() or 0
        self._correct_at.update(rows["attempt"].filter(correct).drop_null().to_pylist())

    def figures(self) -> dict[str, Any]:
        """Rows, accuracy in percent where there are references, forwards, tokens.

        `correct_at_attempt[k]`: rows whose attempt k (0-based) was the first correct one. `response_tokens` are whole
        canvases, what follows the stop token included.
        """
        counts = self._counts
        last = max(self._correct_at, default=-1)
        return {
            "rows": self.rows,
            "judged": counts["judged"],
            "correct": counts["correct"],
            "accuracy": 100.0 * counts["correct"] / counts["judged"] if counts["judged"] else None,
            "correct_at_attempt": [self._correct_at[attempt] for attempt in range(last + 1)],
            "retried": counts["retried"],
            "mean_forwards": counts["forwards"] / counts["ordered"] if counts["ordered"] else None,
            "response_tokens": counts["response_tokens"],
            "prompt_tokens": counts["prompt_tokens"],
        }


Keep = Literal["all", "correct"]


def check_folder(folder: Location) -> None:
    """`InputError` unless rows can be written to `folder`: absent, empty (but for hidden files), or begun by a run.

    A run's folder has a marker: that of its end, that of a writer, or what is staged. Other files in it stay, and
    those that would be read as rows are refused.
    """
    if isinstance(folder.filesystem, fs.LocalFileSystem):
        check_output(folder.path, "output", folder=True)
    names = [name for name in folder.names() if not (name.startswith(".") or LEFTOVER.fullmatch(name))]
    staged = {name for name in (folder / STAGING).names() if not LEFTOVER.fullmatch(name)} if STAGING in names else None
    finished = {SUCCESS, "summary.json"} <= set(names)
    begun = finished or STARTED in names or staged is not None
    rows = [name for name in names if name.endswith(".parquet") and not name.startswith("_")]  # as readers see them
    strange = [name for name in rows if not SHARD.fullmatch(name) and name != ERRORS]
    if staged is not None and staged - STAGED:
        strange.append(STAGING)
    if strange or (names and not begun):
        raise InputError(
            f"output: {folder.name!r} holds {named(strange or names)}, which no run of this kind has written; "
            "accepted: an empty folder, one that such a run has begun, or a name that is free"
        )


def missing_rows(folder: Location, field: str) -> str | None:
    """One line about the prompts of a finished folder that gave no row, with reasons; None where all gave one."""
    summary = json.loads((folder / "summary.json").read_text())
    if not summary["errors"]:
        return None
    file = folder / ERRORS
    errors = pads.dataset(file.path, filesystem=file.filesystem, format="parquet").head(NAMED).to_pylist()
    ids = ["" if error.get("id") is None else f" ({error['id']})" for error in errors]
    reasons = [f"row {error['row'] + 1}{name}: {error['error']}" for name, error in zip(ids, errors, strict=True)]
    total = summary["rows"] + summary["errors"] + summary["duplicates"]
    return (
        f"{field}: {summary['errors']} of {total} gave no trajectory and are in {file.name}, the others beside it: "
        f"{first_failures(reasons, summary['errors'])}"
    )


def check_errors(failed: int, total: int, allowed: float, example: str) -> None:
    """Raise `InputError` when more than the allowed fraction of all prompts failed; a single one never stops a run,
    unless none may fail."""
    if failed > (max(1.0, allowed * total) if allowed else 0.0):
        raise InputError(
            f"prompts: {failed} of {total} gave no trajectory, for example: {example}; accepted: at most "
            f"{allowed:.0%} (max_error_fraction)"
        )
