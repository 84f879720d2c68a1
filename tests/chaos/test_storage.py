"""A disk that becomes full while parts are written, and again while the finished folder is."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.chaos.command import Figures
from tests.chaos.job import INCOMPLETE, Expected, Job
from tests.chaos.watcher import Watcher

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400, func_only=True)]


def readable_ids(folder: Path) -> set[str]:
    """Ids in the Parquet files that can be read."""
    ids: set[str] = set()
    for path in folder.glob("*.parquet"):
        try:
            ids |= set(pq.read_table(path, columns=["prompt_id"])["prompt_id"].to_pylist())
        except pa.ArrowInvalid:
            continue  # the half that fitted
    return ids


def assert_says_full(job: Job, path: str) -> None:
    assert "No space left on device" in job.said and path in job.said, job.printed


def test_full_disk(job: Job, watcher: Watcher, expected: Expected, undisturbed_seconds: float, tmp_path: Path) -> None:
    parts = job.output / "_staging" / "parts"
    job.start(f"--full-disk={parts}")
    assert job.wait() != 0
    assert_says_full(job, str(parts))
    kept, begun = readable_ids(parts), len(job.events("begin"))
    assert len(kept) >= 2 * job.settings.rows_per_block // 2  # two calls' rows

    Path(f"{job.log}.files").unlink()
    job.start(f"--full-disk={job.output}/.*trajectories-")
    assert job.wait() != 0
    assert_says_full(job, str(job.output))
    assert not (job.output / "_SUCCESS").exists()
    assert not kept & {row_id for _, row_id in job.events("begin")[begun:]}
    begun = len(job.events("begin"))

    job.start()
    assert job.wait() == INCOMPLETE, job.printed
    assert len(job.events("begin")) == begun
    job.assert_complete(expected, watcher)
    rows = len(expected.rows) + len(expected.failing)
    Figures("the disk full, twice", 2, rows, job.recomputed(), job.seconds, undisturbed_seconds).report(tmp_path)
