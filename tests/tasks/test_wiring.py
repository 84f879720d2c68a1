"""Split and count of a task arrive in its problems, and every column of a file in its problem."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from d3llm_ray.tasks import EMBEDDED, Problem, Task, load_task, read_problems
from d3llm_ray.tasks.arith import problems


def test_split_and_count_reach_the_problems(tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []
    task = Task("t", lambda split, count: asked.append((split, count)) or [Problem("a", [])])
    assert [problem.id for problem in task.problems("validation", 7)] == ["a"] and asked == [("validation", 7)]
    texts = {
        split: {p.messages[-1]["content"] for p in EMBEDDED["arith"].problems(split, 40)}
        for split in ("train", "validation", "test")
    }
    assert [len(text) for text in texts.values()] == [40] * 3 and len(set.union(*texts.values())) == 120
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": str(n)}) + "\n" for n in range(5)))
    assert [p.messages[0]["content"] for p in load_task(str(file)).problems("train", 3)] == ["0", "1", "2"]


def test_worked_examples_are_of_the_training_split() -> None:
    training, stream = set(), problems("train", seed=1)
    for _ in range(60):
        training.add(next(stream).question)
    for problem in EMBEDDED["arith-long"].problems("test", 10):
        assert len(problem.messages) == 11
        assert {message["content"] for message in problem.messages[:-1:2]} <= training


def test_every_column_of_a_row_arrives(tmp_path: Path) -> None:
    of_a_file = ["id", "messages", "reference", "user_id"]
    assert [field.name for field in fields(Problem)] == [*of_a_file, "text", "prefix"]  # those of published tasks
    file = tmp_path / "mine.jsonl"
    row = {"prompt": "1 + 1?", "reference": "2", "gt_answer": "3", "answer": "#### 4", "id": "mine"}
    rows = [
        row,
        {**row, "reference": None},
        {"question": "1 + 1?", "answer": "2"},
        {"prompt": "1 + 1?", "gt_answer": "3"},
    ]
    file.write_text("".join(json.dumps(values) + "\n" for values in rows))
    found = read_problems(file)
    message = [{"role": "user", "content": "1 + 1?"}]
    assert [(p.messages, p.reference, p.user_id) for p in found] == [
        (message, "2", "mine"), (message, None, "mine"), (message, "2", None), (message, "3", None),
    ]  # fmt: skip
    ids = [problem.id for problem in found]
    assert ids[0] == ids[2] and len(set(ids)) == 3  # of prompt and reference alone


def test_the_last_answer_counts() -> None:
    extract = EMBEDDED["arith"].extract
    assert extract("So far 3.\n#### 3\nNo, 4 of 5.\n#### 4") == "4"
    assert extract(r"\boxed{3} or rather \boxed{4}, not 5") == "4"
    assert extract("3 and 4 make 7") == "7"
