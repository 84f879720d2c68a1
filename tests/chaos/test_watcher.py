"""The watcher of the fault tests sees what they rely on it to see."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.chaos.watcher import Watcher


def watched(folder: Path, expected_ids: list[str]) -> Watcher:
    """A watcher that has looked at the folder as it is."""
    with Watcher(folder, expected_ids) as watcher:
        pass
    return watcher


def test_half_a_file_is_seen_under_a_final_name_only(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt_id": ["a", "b"]}), tmp_path / "_partial.parquet")
    whole = (tmp_path / "_partial.parquet").read_bytes()
    (tmp_path / "_partial.parquet").write_bytes(whole[: len(whole) // 2])
    assert watched(tmp_path, []).faults == []
    (tmp_path / "_partial.parquet").rename(tmp_path / "trajectories-00000.parquet")
    assert [fault.partition(":")[0] for fault in watched(tmp_path, []).faults] == ["trajectories-00000.parquet"]


def test_marker_over_too_few_rows_is_seen(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt_id": ["a", "b"]}), tmp_path / "trajectories-00000.parquet")
    assert not watched(tmp_path, ["a", "b"]).saw_marker
    (tmp_path / "_SUCCESS").touch()
    complete, short = watched(tmp_path, ["a", "b"]), watched(tmp_path, ["a", "b", "c"])
    assert complete.saw_marker and complete.faults == []
    assert short.faults == ["_SUCCESS: set over 2 of 3 rows"]
