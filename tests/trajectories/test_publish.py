from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d3llm_ray.config import build
from d3llm_ray.errors import IncompleteError, InputError
from d3llm_ray.progress import Progress
from d3llm_ray.trajectories import pipeline, read_metadata, read_trajectories, staging
from d3llm_ray.trajectories import publish as publishing
from d3llm_ray.trajectories.plan import TrajectoryPlan, make_plan
from d3llm_ray.trajectories.prompts import Prompt
from d3llm_ray.trajectories.publish import IncompleteRun
from d3llm_ray.trajectories.schema import build_table
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.shards import ShardWriter, check_errors, check_folder, missing_rows
from d3llm_ray.trajectories.staging import Manifest, committed_rows, is_finished, stage, stage_remaining
from d3llm_ray.trajectories.storage import Location
from d3llm_ray.trajectories.teacher import Teacher
from d3llm_ray.trajectories.worker import STAGED_SCHEMA

TEXTS = [f"prompt {number}" for number in range(10)]
QUIET = Progress(quiet=True)


@pytest.fixture
def plan(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrajectoryPlan:
    """Ten prompts, staged in chunks of three."""
    monkeypatch.setattr(staging, "ROWS_PER_FILE", 3)
    values = {"teacher": str(tiny_checkpoint), "texts": TEXTS, "output": str(tmp_path / "out"), "rows_per_file": 4}
    plan = make_plan(build(TrajectorySettings, {**values, "max_error_fraction": 0.2}))
    stage(plan, QUIET)
    return plan


def manifest(plan: TrajectoryPlan) -> Manifest:
    found = staging.read_manifest(plan)
    assert found is not None
    return found


def publish(plan: TrajectoryPlan, figures: dict[str, Any]) -> dict[str, Any]:
    return publishing.publish(plan, manifest(plan), figures, QUIET)


def staged(plan: TrajectoryPlan, number: int) -> dict[str, Any]:
    """The row of prompt `number`, told apart by its only token."""
    prompt = list(plan.prompts())[number]
    return {
        "row": number,
        "prompt_id": prompt.prompt_id,
        "messages": prompt.messages,
        "prompt_ids": [1],
        "response_ids": [number],
        "reveal_step": [0],
        "reveal_entropy": [0.5],
        "is_correct": number % 2 == 0,
        "attempt": number % 3,
        "temperature": 0.0,
        "forwards": 1 + number,
        "seed": 0,
    }


def failed(plan: TrajectoryPlan, number: int) -> dict[str, Any]:
    row = staged(plan, number)
    return {**{name: row[name] for name in ("row", "prompt_id", "messages")}, "error": "too long"}


def write_part(plan: TrajectoryPlan, name: str, rows: list[dict[str, Any]]) -> None:
    plan.parts.make_folder()
    (plan.parts / f"part-{name}.parquet").write_table(build_table(rows, STAGED_SCHEMA))


def test_parts_in_any_order_become_few_files_in_the_order_of_the_prompts(plan: TrajectoryPlan) -> None:
    write_part(plan, "a", [staged(plan, number) for number in (7, 2, 9)])
    write_part(plan, "b", [staged(plan, number) for number in (0, 1, 3, 4)])
    write_part(plan, "c", [staged(plan, number) for number in (8, 6, 5)])
    write_part(plan, "d", [staged(plan, number) for number in (2, 7, 9)])  # a late worker of a killed driver
    (plan.parts / "_partial.part-e.parquet").write_text("half a fi")  # and one killed in the middle of a write
    (plan.output / "trajectories-00009.parquet").write_text("of an earlier publication that was cut short")
    (plan.output / "_partial.1a2b.summary.json").write_text("{")
    summary = publish(plan, {"seconds": 2.0})
    table = read_trajectories(plan.output.name)
    assert table["response_ids"].to_pylist() == [[number] for number in range(10)]
    sizes = [pq.read_metadata(file.path).num_rows for file in plan.output.files(".parquet")]
    assert sizes == [4, 4, 2]
    assert read_metadata(plan.output.name) == plan.metadata
    # Even rows are correct; attempts are 0, 1, 2, 0 ... 0; forwards are 1 to 10.
    expected = {"rows": 10, "judged": 10, "correct": 5, "accuracy": 50.0, "retried": 6, "mean_forwards": 5.5}
    expected |= {"correct_at_attempt": [2, 1, 2], "repeated_rows": 3, "duplicates": 0, "kept": 10}
    assert {name: summary[name] for name in expected} == expected
    assert json.loads((plan.output / "summary.json").read_text()) == summary and summary["seconds"] == 2.0
    assert is_finished(plan, QUIET) and not plan.staging.exists
    assert missing_rows(plan.output, "prompts") is None
    names = [file.path.rpartition("/")[2] for file in plan.output.files() if not file.path.endswith(".parquet")]
    assert names == ["_SUCCESS", "settings.yaml", "summary.json"]


def test_keep_correct_leaves_wrong_rows_out_and_says_how_many_there_were(plan: TrajectoryPlan) -> None:
    plan = make_plan(plan.settings.model_copy(update={"keep": "correct", "output": plan.settings.output + "-kept"}))
    stage(plan, QUIET)
    unjudged = {**staged(plan, 9), "is_correct": None}
    write_part(plan, "a", [*(staged(plan, number) for number in range(9)), unjudged])
    summary = publish(plan, {})
    assert read_trajectories(plan.output.name)["response_ids"].to_pylist() == [[n] for n in (0, 2, 4, 6, 8, 9)]
    assert (summary["rows"], summary["judged"], summary["correct"], summary["kept"]) == (10, 9, 5, 6)


def test_errors_are_kept_apart_and_told(plan: TrajectoryPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    write_part(plan, "a", [failed(plan, 3) if number == 3 else staged(plan, number) for number in range(10)])
    summary = publish(plan, {})
    assert (summary["rows"], summary["errors"]) == (9, 1)
    (error,) = pq.read_table(plan.output.path + "/errors.parquet").to_pylist()
    assert error == {**failed(plan, 3), "reference": None, "id": None}
    told = (
        f"prompts: 1 of 10 gave no trajectory and are in {plan.output.name}/errors.parquet, the others beside it: "
        "row 4: too long"
    )
    with pytest.raises(IncompleteError) as caught:
        pipeline.run(plan.settings, QUIET)
    assert str(caught.value) == told
    progress = Progress(quiet=True)
    monkeypatch.setattr(progress, "note", notes.append)
    assert pipeline.write_trajectories(plan.settings, progress) == plan.settings.output
    assert notes == [f"warning: {told}"]
    assert read_trajectories(plan.output.name)["response_ids"].to_pylist() == [[n] for n in range(10) if n != 3]
    assert is_finished(plan, QUIET)


def test_too_many_errors_leave_no_marker(plan: TrajectoryPlan) -> None:
    write_part(plan, "a", [(failed if number < 3 else staged)(plan, number) for number in range(10)])
    with pytest.raises(InputError, match="3 of 10 gave no trajectory, for example: too long; accepted: at most 20%"):
        publish(plan, {})
    assert not is_finished(plan, QUIET)


@pytest.mark.parametrize(
    ("failed", "total", "allowed", "stops"),
    [
        (1, 4, 0.05, False),
        (2, 4, 0.05, True),
        (1, 4, 0.0, True),
        (0, 4, 0.0, False),
        (5, 100, 0.05, False),
        (6, 100, 0.05, True),
    ],
)
def test_one_bad_prompt_never_stops_a_run_that_may_have_any(
    failed: int, total: int, allowed: float, stops: bool
) -> None:
    with pytest.raises(InputError) if stops else nullcontext():
        check_errors(failed, total, allowed, "too long")


def test_missing_and_foreign_rows_are_named(plan: TrajectoryPlan) -> None:
    with pytest.raises(IncompleteRun, match="10 prompts, 10 staged, 0 distinct rows; 10 without a row"):
        publish(plan, {})
    write_part(plan, "a", [staged(plan, number) for number in range(8)])
    with pytest.raises(IncompleteRun, match="2 without a row") as caught:
        publish(plan, {})
    assert all(staged(plan, number)["prompt_id"] in str(caught.value) for number in (8, 9))
    write_part(plan, "b", [staged(plan, 8), {**staged(plan, 9), "prompt_id": "f" * 16}])
    with pytest.raises(IncompleteRun, match="1 rows have no prompt: ffffffffffffffff"):
        publish(plan, {})
    write_part(plan, "b", [staged(plan, 8), staged(plan, 9), {**staged(plan, 9), "row": 10}])
    with pytest.raises(IncompleteRun, match="11 distinct rows"):
        publish(plan, {})
    assert not is_finished(plan, QUIET)


def test_folder_of_other_settings_is_refused(plan: TrajectoryPlan) -> None:
    write_part(plan, "a", [staged(plan, number) for number in range(10)])
    others = [plan.settings.model_copy(update=change) for change in ({"seed": 1}, {"keep": "correct"}, {"count": 9})]
    for other in others:
        with pytest.raises(InputError, match="a half-finished run of other prompts or settings"):
            stage(make_plan(other), QUIET)
    publish(plan, {})
    for other in others:
        with pytest.raises(InputError, match="a finished run of other prompts or settings"):
            is_finished(make_plan(other), QUIET)


def test_staged_prompts_are_numbered_by_their_place_in_the_source(plan: TrajectoryPlan, tmp_path: Path) -> None:
    texts = ["a", "b", "a", "c", "b", "d", "e"]
    plan = make_plan(plan.settings.model_copy(update={"texts": texts, "output": str(tmp_path / "twice")}))
    found = stage(plan, QUIET)
    assert (found.prompts, found.duplicates) == (5, 2)
    files = plan.staged_prompts.files(".parquet")
    rows = [row for file in files for row in pq.read_table(file.path).to_pylist()]
    assert len(files) == 2 and [row["row"] for row in rows] == [0, 1, 3, 5, 6]
    assert [row["messages"][0]["content"] for row in rows] == ["a", "b", "c", "d", "e"]
    assert stage(plan, QUIET) == found  # and begun again: nothing is written, and the same is found
    (plan.staging / "manifest.json").remove()
    (plan.staged_prompts / "prompts-00007.parquet").write_text("of a staging that was cut short")
    assert stage(plan, QUIET) == found and len(plan.staged_prompts.files()) == 2


def test_half_a_surrogate_pair_costs_its_own_prompt_and_ids_come_along(plan: TrajectoryPlan, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "whole \U0001f600", "id": "a", "reference": "1"},
        {"prompt": "cut \ud83d", "id": 7},
        {"prompt": "cut reference", "reference": "\ud83d"},
        {"prompt": "cut id", "id": "\ud83d"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = plan.settings.model_copy(update={"texts": [], "prompts": str(file), "output": str(tmp_path / "cut")})
    plan = make_plan(chosen)
    stage(plan, QUIET)
    staged_rows = [row for file in plan.staged_prompts.files() for row in pq.read_table(file.path).to_pylist()]
    assert [row["id"] for row in staged_rows] == ["a", "7", None, "\\ud83d"]
    accepted = "accepted: text that can be written as UTF-8"
    whole, cut, reference, _ = [row["error"] for row in staged_rows]
    assert (whole, cut) == (None, f"messages.0: got half of a surrogate pair at character 8; {accepted}")
    assert reference == f"reference: got half of a surrogate pair at character 0; {accepted}"
    assert staged_rows[1]["messages"][0]["content"] == "cut \\ud83d"
    teacher = Teacher(plan.settings, plan.source.task)
    made = teacher.rows([Prompt(**row) for row in staged_rows])
    assert [row.get("error") for row in made] == [None, cut, reference, None]
    assert [row["id"] for row in made] == ["a", "7", None, "\\ud83d"]
    write_part(plan, "a", made)
    publishing.publish(make_plan(chosen.model_copy(update={"max_error_fraction": 0.5})), manifest(plan), {}, QUIET)
    assert read_trajectories(plan.output.name)["id"].to_pylist() == ["a", "\\ud83d"]
    errors = pq.read_table(plan.output.path + "/errors.parquet").to_pylist()
    assert [(error["row"], error["id"], error["error"]) for error in errors] == [(1, "7", cut), (2, None, reference)]
    told = missing_rows(plan.output, "prompts")
    assert told is not None and f"row 2 (7): {cut}; row 3: {reference}" in told
    file.write_text(file.read_text().replace('"a"', '"b"'))
    with pytest.raises(InputError, match="a finished run of other prompts"):  # rows would carry ids of another file
        is_finished(make_plan(chosen), QUIET)


def test_unchanged_prompt_files_are_not_read_again(
    plan: TrajectoryPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    chosen = plan.settings.model_copy(update={"texts": [], "prompts": str(file), "output": str(tmp_path / "files")})
    plan = make_plan(chosen)
    found = stage(plan, QUIET)
    write_part(plan, "a", [staged(plan, 0), staged(plan, 1)])
    with monkeypatch.context() as patch:
        patch.setattr(TrajectoryPlan, "prompts", lambda _self: pytest.fail("the prompts were read again"))
        assert stage(make_plan(chosen), QUIET) == found
        publish(plan, {})
        assert is_finished(make_plan(chosen), QUIET)
    file.write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n')  # another file, the same prompts
    assert is_finished(make_plan(chosen), QUIET)
    file.write_text('{"prompt": "one"}\n{"prompt": "three"}\n')
    with pytest.raises(InputError, match="a finished run of other prompts"):
        is_finished(make_plan(chosen), QUIET)


def test_what_remains_is_what_no_part_holds(plan: TrajectoryPlan) -> None:
    assert committed_rows(plan.parts).size == 0
    assert stage_remaining(plan, committed_rows(plan.parts)) == plan.staged_prompts
    write_part(plan, "b", [staged(plan, number) for number in (5, 3)])
    write_part(plan, "a", [staged(plan, 3), failed(plan, 4), staged(plan, 7)])
    (plan.parts / "_partial.part-c.parquet").write_text("half a fi")
    committed = committed_rows(plan.parts)
    assert np.array_equal(committed, [3, 4, 5, 7])
    (plan.staging / "remaining").make_folder()
    (plan.staging / "remaining" / "prompts-00009.parquet").write_text("of an earlier resumption")
    remaining = stage_remaining(plan, committed)
    chunks = [pq.read_table(file.path).to_pylist() for file in remaining.files()]
    assert [[row["row"] for row in chunk] for chunk in chunks] == [[0, 1, 2], [6, 8], [9]]
    prompts = {prompt.row: prompt.prompt_id for prompt in plan.prompts()}
    assert all(row["prompt_id"] == prompts[row["row"]] for chunk in chunks for row in chunk)


@pytest.mark.parametrize("marker", ["_SUCCESS", "_STARTED"])
def test_other_files_of_the_folder_stay(plan: TrajectoryPlan, marker: str) -> None:
    """Those that are no rows; Parquet files would be read as such, and are refused before they come in the way."""
    folder = Path(plan.output.path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text("{}")
    for name in (marker, "notes.txt", "_partial_results.csv", "trajectories-00007.parquet", "_partial.1a2b.x.parquet"):
        (folder / name).write_text("")
    writer = ShardWriter(plan.output, plan.metadata, rows_per_file=4)
    (folder / "late.parquet").write_text("of somebody else")  # while the run goes on
    writer.finish(plan.settings, {})
    names = {path.name for path in folder.iterdir()} - {"_staging"}
    kept = {"notes.txt", "_partial_results.csv", "late.parquet"}
    assert names == {"trajectories-00000.parquet", "settings.yaml", "summary.json", "_SUCCESS", *kept}
    with pytest.raises(InputError, match=r"output: .* holds 'late.parquet'"):
        check_folder(plan.output)


@pytest.mark.parametrize(
    "names", [["_SUCCESS", "part-0.parquet"], ["_SUCCESS"], ["settings.yaml"], ["_staging/prompts/a", "_staging/mine"]]
)
def test_folder_without_a_marker_of_ours_is_refused(plan: TrajectoryPlan, tmp_path: Path, names: list[str]) -> None:
    for name in names:
        file = tmp_path / "theirs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    with pytest.raises(InputError, match=r"^output: .*theirs"):
        check_folder(Location.of(tmp_path / "theirs"))
    theirs = make_plan(plan.settings.model_copy(update={"output": str(tmp_path / "theirs")}))
    with pytest.raises(InputError, match=r"^output: .*theirs"):
        is_finished(theirs, QUIET)
    assert all((tmp_path / "theirs" / name).read_text() == "mine" for name in names)


def test_failed_write_leaves_no_partial_file_and_links_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "link.parquet").symlink_to(tmp_path / "real.parquet")
    link = Location.of(tmp_path / "link.parquet")
    link.write_table(pa.table({"number": [1]}))
    assert (tmp_path / "link.parquet").is_symlink() and pq.read_table(tmp_path / "real.parquet").num_rows == 1
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="named pipe"):
        Location.of(tmp_path / "pipe").write_text("never")
    (tmp_path / "folder").mkdir()
    with pytest.raises((TypeError, AttributeError)):
        (Location.of(tmp_path) / "rows.parquet").write_table("no table")  # type: ignore[arg-type]
    with pytest.raises(InputError):
        (Location.of(tmp_path) / "folder").write_text("never")
    assert sorted(os.listdir(tmp_path)) == ["folder", "link.parquet", "pipe", "real.parquet"]
