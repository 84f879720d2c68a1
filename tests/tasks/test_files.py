"""Rows of prompts files: which columns are read, and what is said of a malformed row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d3llm_ray.errors import InputError
from d3llm_ray.tasks import load_task
from d3llm_ray.tasks.files import read_problems, to_problem

USER = [{"role": "user", "content": "2 + 2?"}]


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"prompt": "2 + 2?"}, None),
        ({"question": "2 + 2?", "answer": "Two and two.\n#### 4"}, "Two and two.\n#### 4"),
        ({"question": "2 + 2?", "gt_answer": "4", "llm_answer": "5"}, "4"),
        ({"messages": USER, "reference": "4", "other": 1}, "4"),
        ({"messages": [{**USER[0], "name": None}], "prompt": None, "question": None, "reference": None}, None),
        ({"prompt": "2 + 2?", "reference": ""}, None),
        ({"messages": USER, "reference": None, "answer": "a teacher's own answer"}, None),
    ],
)
def test_columns(row: dict[str, Any], reference: str | None) -> None:
    problem = to_problem(row, "row 1")
    assert (problem.messages, problem.reference) == (USER, reference)


def test_a_solution_of_gsm8k_is_a_reference() -> None:
    reference = to_problem({"question": "?", "answer": "48/2 = <<48/2=24>>24\n48+24 = 72\n#### 72"}, "row 1").reference
    task = load_task("arith")
    assert reference is not None
    assert task.is_correct("so it is 72.", reference) and not task.is_correct("#### 24", reference)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "row 7 has the columns 'text'; accepted: exactly one of 'messages', 'prompt' and 'question'"),
        ({}, "row 7 has no column; accepted: exactly one of"),
        ({"prompt": "a", "question": "b"}, "row 7 has the columns 'prompt', 'question'; accepted: exactly one of"),
        ({"messages": [], "reference": "4"}, "row 7: field 'messages'; accepted: 'prompt' or 'question' as text"),
        ({"messages": "hello"}, "row 7: field 'messages'; accepted"),
        ({"question": 3}, "row 7: field 'question'; accepted"),
        ({"question": "a", "answer": 3}, "row 7: field 'answer' is int; accepted: text"),
        (["prompt"], "row 7 is list; accepted: an object with exactly one of"),
    ],
)
def test_a_malformed_row_is_named_with_the_accepted_columns(row: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        to_problem(row, "row 7")
    assert str(caught.value).startswith(message)


def test_the_same_rows_in_every_format_are_the_same_problems(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{n}\u2028é?"}], "reference": str(n)} for n in range(600)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(text + "\n", encoding="utf-8")
    half = len(text.encode()) // 2
    members = [gzip.compress(part) for part in (text.encode()[:half], text.encode()[half:])]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(members))
    pq.write_table(pa.Table.from_pylist([{**row, "id": 1.5} for row in rows]), tmp_path / "a.parquet")
    names = {load_task(str(file)).name for file in tmp_path.iterdir()}
    assert len(names) == 1 and names.pop().startswith("a-")
    for file in tmp_path.iterdir():
        problems = read_problems(file)
        assert [{"messages": p.messages, "reference": p.reference} for p in problems] == rows
        assert len({problem.id for problem in problems}) == 600


def test_files_of_one_name_are_tasks_of_two(tmp_path: Path) -> None:
    for folder, reference in (("one", "4"), ("two", "5")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text(json.dumps({"prompt": "2 + 2?", "reference": reference}))
    one, two = (load_task(str(tmp_path / folder / "test.jsonl")).name for folder in ("one", "two"))
    assert one != two and one.startswith("test-") and two.startswith("test-")


def test_unreadable_files_are_named_in_one_line(tmp_path: Path) -> None:
    row = b'{"prompt": "a"}\n'
    pq.write_table(pa.table({"prompt": ["a"] * 1000}), tmp_path / "whole.parquet")
    whole = bytearray((tmp_path / "whole.parquet").read_bytes())
    whole[4:40] = b"\xff" * 36  # the first page; the footer stays
    files = {
        "line.jsonl": (row + b"\n" + b"{", "line 3 of "),
        "latin.jsonl": (row + b'{"prompt": "\xe9"}', "line 2 of "),
        "half.jsonl.gz": (gzip.compress(row * 1000)[:-12], "cannot read "),
        "plain.jsonl.gz": (row, "cannot read "),
        "text.parquet": (row * 10, "not Parquet"),
        "page.parquet": (bytes(whole), "cannot read "),
        "file.csv": (b"prompt\na\n", "accepted: a .jsonl, .jsonl.gz or .parquet file with exactly one of 'messages'"),
        "empty.jsonl.gz": (gzip.compress(b"\n"), "has no rows"),
        "missing.jsonl": (None, "cannot read "),
    }
    for name, (content, message) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_problems(tmp_path / name)
        text = str(caught.value)
        assert text.startswith("prompts: ") and message in text and name in text and "\n" not in text
