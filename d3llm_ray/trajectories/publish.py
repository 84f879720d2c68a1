"""From staged parts to the finished folder: audit, then few files in the prompts' order, then the marker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from d3llm_ray.errors import WorkError
from d3llm_ray.progress import Progress
from d3llm_ray.trajectories.plan import TrajectoryPlan
from d3llm_ray.trajectories.schema import ERROR_SCHEMA, SCHEMA
from d3llm_ray.trajectories.shards import ShardWriter, check_errors
from d3llm_ray.trajectories.staging import Manifest, rows_and_files, staged_ids
from d3llm_ray.trajectories.worker import STAGED_SCHEMA


class IncompleteRun(WorkError):
    """The parts do not hold every prompt once: a fault of the pipeline, not of its input."""


def publish(plan: TrajectoryPlan, manifest: Manifest, figures: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Write the finished folder and return its summary. `figures` are the run's own (seconds, rows a second).

    Memory holds `staging.ROWS_PER_FILE` rows, and id, number and file of every row of the run. Safe to repeat: an
    interrupted publication is overwritten by the next, and only the marker makes it count.

    Raises:
        IncompleteRun: rows are missing or belong to no prompt; the message names them.
        InputError: more prompts failed than the settings allow.
    """
    chunks = list(staged_ids(plan))
    committed, files = rows_and_files(plan.parts)
    repeated = audit(plan, manifest, chunks, committed)
    files_of = _files_by_chunk(chunks, committed, files)
    settings = plan.settings
    writer = ShardWriter(plan.output, plan.metadata, settings.rows_per_file, settings.keep)
    done = 0
    with progress.stage("publish", manifest.prompts):
        for number, prompts in enumerate(chunks):
            rows = _rows_of(plan, files_of[number], prompts)
            failed = pc.is_valid(rows["error"])
            for error in rows.filter(failed).select(ERROR_SCHEMA.names).to_pylist():
                writer.reject(error)
            writer.write(rows.filter(pc.invert(failed)).select(SCHEMA.names).cast(SCHEMA))
            done += rows.num_rows
            progress.update(done)
    example = writer.errors[0]["error"] if writer.errors else ""
    check_errors(len(writer.errors), manifest.prompts, settings.max_error_fraction, example)
    identity = {"fingerprint": manifest.fingerprint, "inputs": manifest.inputs}
    counts = {"duplicates": manifest.duplicates, "repeated_rows": repeated}
    summary = writer.finish(settings, {**counts, **identity, **figures})
    plan.staging.remove_folder()
    return summary


def audit(plan: TrajectoryPlan, manifest: Manifest, chunks: list[pa.Table], committed: NDArray[np.int64]) -> int:
    """Raise `IncompleteRun` unless the `committed` rows are every staged prompt's; returns how many came again.

    A row is a function of its prompt. Should a worker of a killed driver have finished a part that the next driver
    decoded again, the copies are equal and one is kept.
    """
    distinct = np.unique(committed)
    expected = count = 0
    missing: list[str] = []
    for prompts in chunks:
        rows = prompts["row"].to_numpy()
        expected += len(rows)
        absent = ~np.isin(rows, distinct, assume_unique=True)
        count += int(absent.sum())
        missing += prompts["prompt_id"].filter(pa.array(absent)).to_pylist()[: 10 - len(missing)]
    if count or len(distinct) != expected or expected != manifest.prompts:
        raise IncompleteRun(
            f"{plan.parts.name}: {manifest.prompts} prompts, {expected} staged, {len(distinct)} distinct rows; "
            f"{count} without a row: {', '.join(missing) or 'none'}"
        )
    return len(committed) - len(distinct)


def _files_by_chunk(chunks: list[pa.Table], rows: NDArray[np.int64], files: pa.ChunkedArray) -> dict[int, list[str]]:
    """Which parts hold rows of which chunk."""
    firsts = [prompts["row"][0].as_py() for prompts in chunks]
    numbers = pa.array(np.searchsorted(firsts, rows, side="right") - 1)
    pairs = pa.table({"chunk": numbers, "file": files}).group_by(["chunk", "file"]).aggregate([]).sort_by("file")
    files_of: dict[int, list[str]] = defaultdict(list)
    for chunk, file in zip(pairs["chunk"].to_pylist(), pairs["file"].to_pylist(), strict=True):
        files_of[chunk].append(file)
    return files_of


def _rows_of(plan: TrajectoryPlan, files: list[str], prompts: pa.Table) -> pa.Table:
    """The staged rows of one chunk of `staged_ids`, in its order."""
    wanted = prompts["row"]
    dataset = pads.dataset(files, schema=STAGED_SCHEMA, filesystem=plan.output.filesystem, format="parquet")
    table = dataset.to_table(filter=(pc.field("row") >= wanted[0]) & (pc.field("row") <= wanted[-1]))
    _, order = np.unique(table["row"].to_numpy(), return_index=True)  # ascending, one of each
    table = table.take(order)
    same = pc.equal(table["prompt_id"].combine_chunks(), prompts["prompt_id"].combine_chunks())
    if not pc.all(same).as_py():
        odd = table["prompt_id"].filter(pc.invert(same))
        raise IncompleteRun(f"{plan.parts.name}: {len(odd)} rows have no prompt: {', '.join(odd.to_pylist()[:10])}")
    return table
