from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d3llm_ray.errors import InputError
from d3llm_ray.trajectories.schema import SCHEMA, build_table, check_table, read_metadata, read_trajectories
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.shards import ShardWriter
from d3llm_ray.trajectories.storage import Location

# ARCHITECTURE.md's "Trajectory row", spelled out: a change of the file format must show here.
TYPES = {
    "prompt_id": "string",
    "messages": "list<element: struct<role: string, content: string>>",
    "prompt_ids": "list<element: int32>",
    "response_ids": "list<element: int32>",
    "reveal_step": "list<element: uint16>",
    "reveal_entropy": "list<element: halffloat>",
    "reference": "string",
    "answer": "string",
    "is_correct": "bool",
    "attempt": "int8",
    "temperature": "float",
    "forwards": "int32",
    "seed": "int64",
    "reference_ids": "list<element: int32>",
    "id": "string",
}


def row(number: int, canvas: int = 64, vocabulary: int = 30000) -> dict[str, Any]:
    rng = random.Random(number)
    order = list(range(canvas))
    rng.shuffle(order)
    return {
        "prompt_id": f"{rng.getrandbits(64):016x}",
        "messages": [{"role": "user", "content": f"Question {number}: " + "how many? " * 8}],
        "prompt_ids": [rng.randrange(vocabulary) for _ in range(48)],
        "response_ids": [rng.randrange(vocabulary) for _ in range(canvas)],
        "reveal_step": order,
        "reveal_entropy": [rng.randrange(1024) / 1024 for _ in range(canvas)],  # exact in float16
        "reference": "42",
        "answer": "41",
        "is_correct": False,
        "attempt": 4,
        "temperature": 0.5,
        "forwards": canvas,
        "seed": rng.getrandbits(63),
        "reference_ids": None,
        "id": None,
    }


def finished(folder: Path, rows: list[dict[str, Any]], rows_per_file: int = 100) -> Path:
    writer = ShardWriter(Location.of(folder), {"teacher": "t"}, rows_per_file)
    for row in rows:
        writer.write(build_table([row]))
    writer.finish(TrajectorySettings(), {})
    return folder


def test_schema_is_the_published_one() -> None:
    table = build_table([row(0)])
    assert {name: str(table.schema.field(name).type) for name in table.schema.names} == TYPES


def test_round_trip_over_several_files_keeps_every_value(tmp_path: Path) -> None:
    rows = [row(number) for number in range(7)]
    folder = finished(tmp_path / "out", rows, rows_per_file=3)
    assert len(list(folder.glob("*.parquet"))) == 3
    assert read_trajectories(folder).to_pylist() == rows
    assert read_metadata(folder) == {"teacher": "t"}
    assert read_trajectories(folder.as_uri()).num_rows == 7
    assert read_trajectories(folder, columns=["seed"]).to_pydict() == {"seed": [r["seed"] for r in rows]}


def test_files_of_earlier_versions_still_read(tmp_path: Path) -> None:
    """They end with the column `seed`."""
    folder = finished(tmp_path / "out", [row(0)])
    (file,) = folder.glob("*.parquet")
    pq.write_table(pq.read_table(file).drop_columns(["reference_ids", "id"]), file)
    assert read_trajectories(folder).to_pylist() == [row(0)] == read_trajectories(file).to_pylist()
    assert read_trajectories(folder, columns=["reference_ids"]).to_pydict() == {"reference_ids": [None]}
    assert read_metadata(folder) == {"teacher": "t"}


@pytest.mark.parametrize(("canvas", "limit"), [(64, 1000), (256, 2000)])
def test_size_of_a_row_on_disk(canvas: int, limit: int, tmp_path: Path) -> None:
    """Uniform random ids of LLaDA's vocabulary and random orders: nothing to compress, prompt and its text included."""
    folder = finished(tmp_path / "out", [row(number, canvas, 126_464) for number in range(400)], rows_per_file=1000)
    (file,) = folder.glob("*.parquet")
    assert file.stat().st_size / 400 <= limit
    column = pq.ParquetFile(file).metadata.row_group(0).column(0)
    assert column.compression == "ZSTD"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reveal_step": [0] * 63}, "reveal_step and response_ids differ"),
        ({"reveal_entropy": [0.0] * 65}, "reveal_entropy and response_ids differ"),
        ({"forwards": 63}, "not below its row's forwards"),
        ({"prompt_ids": None}, "'prompt_ids' holds nulls"),
    ],
)
def test_contradictory_rows_are_refused(change: dict[str, Any], message: str) -> None:
    nullable = pa.schema([field.with_nullable(True) for field in SCHEMA])
    table = build_table([row(0), {**row(1), **change}], nullable)
    with pytest.raises(InputError, match=message):
        check_table(table, "test")
    check_table(table.slice(0, 1), "test")


def test_missing_and_mistyped_columns_are_named() -> None:
    table = build_table([row(0)])
    with pytest.raises(InputError, match="column 'seed' is missing"):
        check_table(table.drop_columns(["seed"]), "test")
    position = table.schema.get_field_index("attempt")
    with pytest.raises(InputError, match="column 'attempt' is int64; accepted: int8"):
        check_table(table.set_column(position, "attempt", table["attempt"].cast(pa.int64())), "test")
    with pytest.raises(ValueError, match="surprise"):
        build_table([{**row(0), "surprise": 1}])


def test_imported_rows_may_lack_what_the_layout_does_not_tell() -> None:
    imported = {**row(0), **dict.fromkeys(("reveal_entropy", "attempt", "temperature", "seed", "messages"))}
    check_table(build_table([imported]), "test")


def test_unfinished_absent_and_foreign_paths_are_refused(tmp_path: Path) -> None:
    folder = finished(tmp_path / "out", [row(0)])
    (folder / "_SUCCESS").unlink()
    with pytest.raises(InputError, match="has no _SUCCESS"):
        read_trajectories(folder)
    with pytest.raises(InputError, match="does not exist"):
        read_trajectories(tmp_path / "nothing")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(InputError, match="is not Parquet"):
        read_trajectories(tmp_path / "text.parquet")
