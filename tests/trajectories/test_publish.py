from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d3llm_ray.config import build
from d3llm_ray.errors import InputError
from d3llm_ray.trajectories import read_metadata, read_trajectories
from d3llm_ray.trajectories.plan import Plan, check_resumable, make_plan
from d3llm_ray.trajectories.publish import STAGED_SCHEMA, IncompleteRun, is_finished, publish
from d3llm_ray.trajectories.schema import build_table
from d3llm_ray.trajectories.settings import TrajectorySettings

TEXTS = [f"prompt {number}" for number in range(10)]


@pytest.fixture
def plan(tiny_checkpoint: Path, tmp_path: Path) -> Plan:
    values = {"teacher": str(tiny_checkpoint), "texts": TEXTS, "output": str(tmp_path / "out"), "rows_per_file": 4}
    return make_plan(build(TrajectorySettings, {**values, "max_error_fraction": 0.2}))


def staged(plan: Plan, number: int) -> dict[str, Any]:
    """The row of prompt `number`, told apart by its only token."""
    prompt = plan.prompts[number]
    return {
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


def write_part(plan: Plan, name: str, rows: list[dict[str, Any]]) -> None:
    plan.parts.make_folder()
    (plan.parts / f"{name}.parquet").write_table(build_table(rows, STAGED_SCHEMA))


def test_parts_in_any_order_become_few_files_in_the_order_of_the_prompts(plan: Plan) -> None:
    write_part(plan, "a", [staged(plan, number) for number in (7, 2, 9)])
    write_part(plan, "b", [staged(plan, number) for number in (0, 1, 3, 4)])
    write_part(plan, "c", [staged(plan, number) for number in (8, 6, 5)])
    write_part(plan, "d", [staged(plan, number) for number in (2, 7, 9)])  # a late worker of a killed driver
    summary = publish(plan, {"seconds": 2.0})
    table = read_trajectories(plan.output.name)
    assert table["response_ids"].to_pylist() == [[number] for number in range(10)]
    sizes = [pq.read_metadata(file.path).num_rows for file in plan.output.files(".parquet")]
    assert sizes == [4, 4, 2]
    assert read_metadata(plan.output.name) == plan.metadata
    # Even rows are correct; attempts are 0, 1, 2, 0 ... 0; forwards are 1 to 10.
    expected = {"rows": 10, "judged": 10, "correct": 5, "accuracy": 50.0, "retried": 6, "mean_forwards": 5.5}
    assert {name: summary[name] for name in expected} == expected
    assert json.loads((plan.output / "summary.json").read_text()) == summary and summary["seconds"] == 2.0
    assert is_finished(plan) and not plan.staging.exists


def test_errors_are_kept_apart(plan: Plan) -> None:
    failed = {"prompt_id": plan.prompts[3].prompt_id, "messages": plan.prompts[3].messages, "error": "too long"}
    write_part(plan, "a", [failed if number == 3 else staged(plan, number) for number in range(10)])
    summary = publish(plan, {})
    assert (summary["rows"], summary["errors"]) == (9, 1)
    assert json.loads((plan.output / "errors.jsonl").read_text()) == failed
    assert read_trajectories(plan.output.name)["response_ids"].to_pylist() == [[n] for n in range(10) if n != 3]
    assert is_finished(plan)


def test_too_many_errors_leave_no_marker(plan: Plan) -> None:
    failed = [{"prompt_id": prompt.prompt_id, "error": "too long"} for prompt in plan.prompts[:3]]
    write_part(plan, "a", [*failed, *(staged(plan, number) for number in range(3, 10))])
    with pytest.raises(InputError, match="3 of 10 could not be decoded, for example: too long; accepted: at most 20%"):
        publish(plan, {})
    assert not is_finished(plan)


def test_missing_and_foreign_rows_are_found(plan: Plan) -> None:
    with pytest.raises(IncompleteRun, match="no parts"):
        publish(plan, {})
    foreign = {**staged(plan, 0), "prompt_id": "f" * 16}
    write_part(plan, "a", [foreign, *(staged(plan, number) for number in range(8))])
    with pytest.raises(IncompleteRun, match="2 prompts have no row, 1 rows have no prompt"):
        publish(plan, {})
    assert not is_finished(plan)


def test_folder_of_other_settings_is_refused(plan: Plan) -> None:
    write_part(plan, "a", [staged(plan, number) for number in range(10)])
    publish(plan, {})
    other = make_plan(plan.settings.model_copy(update={"seed": 1}))
    with pytest.raises(InputError, match="a finished run of other prompts or settings"):
        is_finished(other)


def test_committed_ids_leave_out_pending_parts(plan: Plan) -> None:
    """Ray Data's layout: `<part>.parquet` holds committed ids, `<part>.pending.parquet` those half written."""
    ids = [prompt.prompt_id for prompt in plan.prompts]
    plan.checkpoint.make_folder()
    assert check_resumable(plan) == 0
    (plan.checkpoint / "one.parquet").write_table(pa.table({"prompt_id": ids[:3]}))
    (plan.checkpoint / "two.pending.parquet").write_table(pa.table({"prompt_id": ids[3:5]}))
    assert plan.committed_ids() == set(ids[:3]) and check_resumable(plan) == 3
    with pytest.raises(InputError, match="half-finished run of other prompts or settings"):
        check_resumable(make_plan(plan.settings.model_copy(update={"seed": 1})))
