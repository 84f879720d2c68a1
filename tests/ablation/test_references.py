"""Reference answers: the teacher's prompts with solutions of the task, nothing else changed."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from d3llm_ray.ablation.references import write_reference_answers
from d3llm_ray.errors import InputError
from d3llm_ray.trajectories.schema import SCHEMA, read_trajectories
from d3llm_ray.trajectories.storage import Location


def test_same_prompts_with_a_right_solution_and_no_order(make_settings, rows, tiny_checkpoint, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        write_reference_answers(str(rows), str(tiny_checkpoint), Location.of(folder), make_settings())
    written = read_trajectories(folders[0]).to_pylist()
    assert written == read_trajectories(folders[1]).to_pylist()  # a function of the prompts
    teachers = {row["prompt_id"]: row for row in pq.read_table(rows).to_pylist() if row["is_correct"]}
    assert len(written) == 36 and {row["prompt_id"] for row in written} == teachers.keys()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    solutions = set()
    for row in written:
        teacher = teachers[row["prompt_id"]]
        assert {name: row[name] for name in ("messages", "prompt_ids", "reference")} == {
            name: teacher[name] for name in ("messages", "prompt_ids", "reference")
        }
        assert row["reveal_step"] is row["forwards"] is row["attempt"] is None and row["is_correct"]
        assert len(row["response_ids"]) == 64
        end = row["response_ids"].index(tokenizer.eos_token_id)
        assert set(row["response_ids"][end:]) == {tokenizer.eos_token_id}
        text = tokenizer.decode(row["response_ids"][:end])
        assert text.endswith(f"\n#### {teacher['reference']}") and tokenizer.unk_token_id not in row["response_ids"]
        solutions.add(text.split()[0])
    assert len(solutions) > 2  # several openings


def test_other_prompts_are_refused(make_settings, rows, tiny_checkpoint, tmp_path):
    table = pq.read_table(rows).to_pylist()
    table[3]["messages"] = [{"role": "user", "content": "What is love?"}]
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), foreign)
    with pytest.raises(InputError, match=r"1 of 36 prompts are not the embedded task's.*reference_trajectories"):
        write_reference_answers(str(foreign), str(tiny_checkpoint), Location.of(tmp_path / "out"), make_settings())
    assert not (tmp_path / "out").exists()


def test_a_canvas_too_short_for_a_solution_is_refused(make_settings, rows, tiny_checkpoint, tmp_path):
    table = pq.read_table(rows).to_pylist()
    for row in table:
        row["response_ids"], row["reveal_step"] = row["response_ids"][:8], list(range(8))
    short = tmp_path / "short.parquet"
    pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), short)
    with pytest.raises(InputError, match=r"trajectories: got '8 response positions'; accepted: at least \d+"):
        write_reference_answers(str(short), str(tiny_checkpoint), Location.of(tmp_path / "out"), make_settings())
