"""From staged parts to the finished folder: few files in the prompts' order, errors apart, a marker last."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from d3llm_ray.config import to_yaml
from d3llm_ray.errors import InputError
from d3llm_ray.trajectories.plan import Plan
from d3llm_ray.trajectories.schema import SCHEMA, check_table, read_trajectories, with_metadata
from d3llm_ray.trajectories.storage import SUCCESS, Location

# A part's row: a trajectory, or a prompt that failed with `error` saying why and the trajectory's columns null.
STAGED_SCHEMA = pa.schema([*(field.with_nullable(True) for field in SCHEMA), pa.field("error", pa.string())])
ERRORS = "errors.jsonl"


class IncompleteRun(RuntimeError):
    """The parts do not hold every prompt once: a fault of the pipeline, not of its input."""


def staged_rows(plan: Plan) -> pa.Table:
    """Every staged row once, in the order of the prompts, held in memory (1 to 3 kB a row).

    A row is a function of its id. Should a worker of a killed driver have finished a part that the next driver
    decoded again, the copies are equal and one is kept.
    """
    files = [file.path for file in plan.parts.files(".parquet")]
    if not files:
        raise IncompleteRun(f"{plan.parts.name}: no parts")
    parts = pads.dataset(files, schema=STAGED_SCHEMA, filesystem=plan.output.filesystem, format="parquet").to_table()
    index_of: dict[str, int] = {}
    for index, row_id in enumerate(parts["prompt_id"].to_pylist()):
        index_of.setdefault(row_id, index)
    expected = [prompt.prompt_id for prompt in plan.prompts]
    if index_of.keys() != set(expected):
        missing, extra = len(set(expected) - index_of.keys()), len(index_of.keys() - set(expected))
        raise IncompleteRun(f"{plan.parts.name}: {missing} prompts have no row, {extra} rows have no prompt")
    return parts.take(pa.array([index_of[row_id] for row_id in expected], pa.int64()))


def publish(plan: Plan, figures: dict[str, Any]) -> dict[str, Any]:
    """Write the finished folder and return its summary. `figures` are the run's own (seconds, rows a second).

    Safe to repeat: an interrupted publication is overwritten by the next, and only the marker makes it count.
    Raises `InputError` when more prompts failed than the settings allow.
    """
    staged = staged_rows(plan)
    failed = pc.is_valid(staged["error"])
    errors = staged.filter(failed).select(["prompt_id", "messages", "error"]).to_pylist()
    check_errors(len(errors), len(plan.prompts), plan.settings.max_error_fraction, errors[0]["error"] if errors else "")
    rows = staged.filter(pc.invert(failed)).select(SCHEMA.names).cast(SCHEMA)
    check_table(rows, plan.parts.name)
    rows = rows.replace_schema_metadata(with_metadata(SCHEMA, plan.metadata).metadata)
    files = write_files(plan.output, rows, plan.settings.rows_per_file)
    if errors:
        (plan.output / ERRORS).write_text("".join(json.dumps(error) + "\n" for error in errors))
    summary = {**summarise(rows), "errors": len(errors), "duplicates": plan.duplicates, **figures}
    summary["bytes_per_row"] = round(sum(file.info.size for file in files) / max(1, rows.num_rows))
    (plan.output / "settings.yaml").write_text(to_yaml(plan.settings))
    (plan.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (plan.output / SUCCESS).write_text("")
    plan.staging.remove_folder()
    return summary


def write_files(folder: Location, rows: pa.Table, rows_per_file: int) -> list[Location]:
    """Write `rows` as `trajectories-00000-of-N.parquet` and so on; at least one file."""
    starts = range(0, max(1, rows.num_rows), rows_per_file)
    files = [folder / f"trajectories-{number:05d}-of-{len(starts):05d}.parquet" for number in range(len(starts))]
    for file, start in zip(files, starts, strict=True):
        file.write_table(rows.slice(start, rows_per_file))
    return files


def check_errors(failed: int, total: int, allowed: float, example: str) -> None:
    """Raise `InputError` when more than the allowed fraction of all prompts failed."""
    if failed > allowed * total:
        raise InputError(
            f"prompts: {failed} of {total} could not be decoded, for example: {example}; accepted: at most "
            f"{allowed:.0%} (max_error_fraction)"
        )


def summarise(rows: pa.Table) -> dict[str, Any]:
    """Figures of finished rows: counts, accuracy where there are references (percent), forwards, tokens."""
    judged = rows.num_rows - rows["is_correct"].null_count
    correct = pc.sum(rows["is_correct"]).as_py() or 0
    return {
        "rows": rows.num_rows,
        "judged": judged,
        "correct": correct,
        "accuracy": 100.0 * correct / judged if judged else None,
        "retried": pc.sum(pc.greater(rows["attempt"], 0)).as_py() or 0,
        "mean_forwards": pc.mean(rows["forwards"]).as_py(),
        "response_tokens": pc.sum(pc.list_value_length(rows["response_ids"])).as_py() or 0,
        "prompt_tokens": pc.sum(pc.list_value_length(rows["prompt_ids"])).as_py() or 0,
    }


def is_finished(plan: Plan) -> bool:
    """Whether the output already holds exactly this run; `InputError` when it holds another one."""
    if not (plan.output / SUCCESS).exists:
        return False
    ids = set(read_trajectories(plan.output.name, columns=["prompt_id"])["prompt_id"].to_pylist())
    errors = plan.output / ERRORS
    if errors.exists:
        ids |= {json.loads(line)["prompt_id"] for line in errors.read_text().splitlines()}
    if ids != {prompt.prompt_id for prompt in plan.prompts}:
        raise InputError(
            f"output: {plan.settings.output!r} holds a finished run of other prompts or settings; accepted: the "
            "settings.yaml beside it, or another folder"
        )
    plan.staging.remove_folder()
    return True
