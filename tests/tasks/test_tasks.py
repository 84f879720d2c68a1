"""The embedded task and tasks from files."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d3llm_ray.errors import InputError
from d3llm_ray.tasks import load_task
from d3llm_ray.tasks.arith import MAX_TOTAL, problems, vocabulary_texts
from d3llm_ray.tasks.tokenizer import build_tokenizer


def _solve(question: str) -> int:
    """An independent reading of the question text alone."""
    first, *sentences = re.split(r"(?<=\.) ", question.rsplit("How many", 1)[0].strip())
    total = int(re.search(r"\d+", first).group())
    for sentence in sentences:
        number = re.search(r"\d+", sentence)
        if re.search(r"doubles|as many again", sentence):
            total *= 2
        elif re.search(r"buys|finds|gets", sentence):
            total += int(number.group())
        else:
            assert re.search(r"gives away|loses|sells", sentence), sentence
            total -= int(number.group())
    return total


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_answers_follow_from_the_question(split: str) -> None:
    rng = random.Random(1)
    for problem in itertools.islice(problems(split), 300):
        assert problem.answer == _solve(problem.question)
        assert 0 < problem.answer <= MAX_TOTAL
        solution = problem.solution(rng)
        assert solution.endswith(f"\n#### {problem.answer}")
        for left, operation, right, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", solution):
            assert int(left) + int(right) * {"+": 1, "-": -1}[operation] == int(result)


def test_splits_are_disjoint_by_content() -> None:
    contents = {
        split: {(p.start, p.steps) for p in itertools.islice(problems(split), 2000)}
        for split in ("train", "validation", "test")
    }
    for one, other in itertools.combinations(contents.values(), 2):
        assert not one & other


def test_problems_are_reproducible_and_distinct() -> None:
    one, two = load_task("arith").problems("test", 200), load_task("arith").problems("test", 300)
    assert one == two[:200]
    assert len({problem.messages[-1]["content"] for problem in two}) == 300
    long = load_task("arith-long").problems("test", 20)
    assert all(len(problem.messages) == 11 for problem in long)
    assert [problem.reference for problem in long] == [problem.reference for problem in one[:20]]


def test_tokenizer_gives_every_text_back() -> None:
    tokenizer, rng = build_tokenizer(vocabulary_texts()), random.Random(2)
    for problem in itertools.islice(problems("train"), 300):
        for text in (problem.question, problem.solution(rng)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
            assert len(ids) < 64
    assert len(tokenizer(" 42", add_special_tokens=False)["input_ids"]) == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 3.\n#### 42", "42"),
        ("#### 1,042.", "1042"),
        (r"thus \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{7} and \boxed{8", "8"),
        ("He has 12.50 left, then 13.0", "13"),
        ("nothing", None),
    ],
)
def test_extracting_answers(text: str, answer: str | None) -> None:
    assert load_task("arith").extract(text) == answer


def test_checking_answers() -> None:
    task = load_task("arith")
    assert task.is_correct("5 + 2 = 7.\n#### 7", "7")
    assert not task.is_correct("#### 7", "70") and not task.is_correct("no number", "7")
    assert task.is_correct("#### 1042", "therefore 1000 and more #### 1,042")


def test_file_tasks(tmp_path: Path) -> None:
    rows = [{"prompt": "1 + 1?", "reference": "2"}, {"messages": [{"role": "user", "content": "hi"}]}]
    jsonl = tmp_path / "mine.jsonl"
    jsonl.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    task = load_task(str(jsonl))
    first, second = task.problems(count=10)
    assert task.name.startswith("mine-") and first.messages == [{"role": "user", "content": "1 + 1?"}]
    assert first.reference == "2" and second.reference is None and first.id != second.id
    parquet = tmp_path / "mine.parquet"
    pq.write_table(pa.Table.from_pylist(rows[:1]), parquet)
    assert load_task(str(parquet)).problems(count=1) == [first]


def test_bad_input_is_named(tmp_path: Path) -> None:
    for content, message in (
        ("", "no rows"),
        ("{", "line 1 .* not JSON"),
        ('{"a": 1}', "line 1 .* has the columns 'a'; accepted: exactly one of 'messages', 'prompt' and 'question'"),
        ('\n{"prompt": 3}', "line 2 .* 'prompt'"),
        ('{"prompt": "a", "reference": 3}', "reference"),
        ('{"messages": [{"role": "user"}]}', "line 1 .* 'messages'"),
    ):
        file = tmp_path / "bad.jsonl"
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            load_task(str(file))
    (tmp_path / "bad.parquet").write_text("no parquet")
    for name in (str(tmp_path / "bad.parquet"), str(tmp_path / "missing.jsonl"), "no-task", "file.csv"):
        with pytest.raises(InputError, match="accepted"):
            load_task(name)
    with pytest.raises(InputError, match="split.*accepted: test, train, validation"):
        load_task("arith").problems("bogus")
