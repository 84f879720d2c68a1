"""The half-done run on storage: numbered prompts, committed parts, and the prompts that are left.

All of it is written in constant memory. The manifest comes last: without it the staged prompts do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray

from d3llm_ray.config import to_yaml
from d3llm_ray.errors import InputError
from d3llm_ray.progress import Progress
from d3llm_ray.trajectories.plan import TrajectoryPlan
from d3llm_ray.trajectories.prompts import Prompt
from d3llm_ray.trajectories.schema import MESSAGES
from d3llm_ray.trajectories.shards import check_folder
from d3llm_ray.trajectories.storage import STARTED, SUCCESS, Location

PROMPT_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("messages", MESSAGES),
        pa.field("reference", pa.string()),
        pa.field("id", pa.string()),
        pa.field("error", pa.string()),  # of a prompt that is known to be bad before anybody decodes it
    ]
)
ROWS_PER_FILE = 50_000  # of staged prompts: what staging and publishing hold in memory at a time
ROWS_PER_GROUP = 1024  # a read task takes whole row groups


@dataclass(frozen=True)
class Manifest:
    """What a run consists of; two runs with the same fingerprint are the same run."""

    fingerprint: str  # of every prompt_id, row, reference and id in order, and of what is kept
    prompts: int  # distinct ones
    duplicates: int  # prompts that came again in the source
    inputs: str | None  # of the source's files and the settings: unchanged, they spare reading a million prompts again


def read_manifest(plan: TrajectoryPlan) -> Manifest | None:
    """The manifest of a half-done run; None when there is none."""
    file = plan.staging / "manifest.json"
    return Manifest(**json.loads(file.read_text())) if file.exists else None


def stage(plan: TrajectoryPlan, progress: Progress) -> Manifest:
    """Number the prompts of a new run and write them; of one begun before, check that it is the same run.

    Raises `InputError` when the folder holds another run's work, or when the source turns out to be malformed.
    """
    begun = read_manifest(plan)
    if begun is not None and begun.inputs is not None and begun.inputs == _inputs(plan):
        return begun
    if begun is None:
        plan.staging.remove_folder()  # a staging that was cut short
        plan.staged_prompts.make_folder()
    manifest = _number(plan, progress, write=begun is None)
    if begun is None:
        (plan.output / "settings.yaml").write_text(to_yaml(plan.settings))
        (plan.staging / "manifest.json").write_text(json.dumps(asdict(manifest)))
    elif begun.fingerprint != manifest.fingerprint:
        raise _other_run(plan, "half-finished")
    return manifest


def is_finished(plan: TrajectoryPlan, progress: Progress) -> bool:
    """Whether the output already holds exactly this run; `InputError` when it holds another one, or other files."""
    check_folder(plan.output)
    if not (plan.output / SUCCESS).exists:
        return False
    summary, inputs = json.loads((plan.output / "summary.json").read_text()), _inputs(plan)
    unchanged = inputs is not None and summary.get("inputs") == inputs
    if not unchanged and summary.get("fingerprint") != _number(plan, progress, write=False).fingerprint:
        raise _other_run(plan, "finished")
    plan.staging.remove_folder()
    if (plan.output / STARTED).exists:  # stopped behind the other marker
        (plan.output / STARTED).remove()
    return True


def _other_run(plan: TrajectoryPlan, state: str) -> InputError:
    return InputError(
        f"output: {plan.settings.output!r} holds a {state} run of other prompts or settings; accepted: the "
        "settings.yaml beside it, or another folder"
    )


def _number(plan: TrajectoryPlan, progress: Progress, write: bool) -> Manifest:
    """Go through the source once; with `write`, into the staged prompts' files."""
    digest, count, last = hashlib.sha256(plan.settings.keep.encode()), 0, -1
    prompts = plan.prompts()
    with progress.stage("prompts", plan.source.total, "prompt"):
        while batch := list(islice(prompts, ROWS_PER_FILE)):
            for prompt in batch:
                named = "" if prompt.id is None else f" {prompt.id}"
                digest.update(f"{prompt.row} {prompt.prompt_id} {prompt.reference}{named}\n".encode())
            if write:
                _write_prompts(plan.staged_prompts / f"prompts-{count // ROWS_PER_FILE:05d}.parquet", batch)
            count, last = count + len(batch), batch[-1].row
            progress.update(last + 1)
    return Manifest(digest.hexdigest()[:16], count, last + 1 - count, _inputs(plan))


def _inputs(plan: TrajectoryPlan) -> str | None:
    """A hash of all that decides which prompts there are, without reading them; None where that is not known."""
    source = plan.source
    if source.version is None:
        return None
    content = json.dumps([source.version, source.count, plan.settings.keep, plan.generation], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _write_prompts(file: Location, prompts: list[Prompt]) -> None:
    columns = {name: [getattr(prompt, name) for prompt in prompts] for name in PROMPT_SCHEMA.names}
    file.write_table(pa.table(columns, schema=PROMPT_SCHEMA), ROWS_PER_GROUP)


def staged_ids(plan: TrajectoryPlan) -> Iterator[pa.Table]:
    """`row` and `prompt_id` of every prompt, ascending, at most `ROWS_PER_FILE` at a time."""
    for file in plan.staged_prompts.files(".parquet"):
        dataset = pads.dataset(file.path, filesystem=file.filesystem, format="parquet")
        yield dataset.to_table(columns=["row", "prompt_id"])


def stage_remaining(plan: TrajectoryPlan, committed: NDArray[np.int64]) -> Location:
    """A folder of the staged prompts that are not among the `committed` rows."""
    if not committed.size:
        return plan.staged_prompts
    remaining = plan.staging / "remaining"
    remaining.remove_folder()
    remaining.make_folder()
    for file in plan.staged_prompts.files(".parquet"):
        prompts = pq.read_table(file.path, filesystem=file.filesystem, partitioning=None)
        left = prompts.filter(pa.array(~np.isin(prompts["row"].to_numpy(), committed)))
        if left.num_rows:
            (remaining / file.path.rpartition("/")[2]).write_table(left, ROWS_PER_GROUP)
    return remaining


def committed_rows(parts: Location) -> NDArray[np.int64]:
    """The `row` of every prompt that a part holds, ascending."""
    return np.unique(rows_and_files(parts)[0])


def rows_and_files(parts: Location) -> tuple[NDArray[np.int64], pa.ChunkedArray]:
    """(`row`, path of the part that holds it) of every committed row, a prompt that two parts hold twice."""
    files = [file.path for file in parts.files(".parquet")]
    if not files:
        return np.empty(0, dtype=np.int64), pa.chunked_array([], pa.string())
    schema = pa.schema([pa.field("row", pa.int64())])
    dataset = pads.dataset(files, schema=schema, filesystem=parts.filesystem, format="parquet")
    table = dataset.to_table(columns=["row", "__filename"])
    return table["row"].to_numpy(), table["__filename"]
