"""Published tasks: prompts as printed in the files of lm-eval and evalplus, data from files and from the Hub."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from d3llm_ray.errors import InputError
from d3llm_ray.tasks import PUBLISHED, Problem, Split, load_task
from d3llm_ray.tasks.published import data
from d3llm_ray.tasks.published.reasoning import StatedAnswer

REAL = Path(__file__).parents[3] / "shared" / "benchmarks"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the benchmarks are not here (../shared/benchmarks)")

DOUBLE = 'def double(n):\n    """Twice n."""\n'
ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k_test.jsonl": [{"question": "What is 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2.\n#### 2"}],
    "gsm8k_train.jsonl": [
        {"question": f"{n} and 1?", "answer": f"It is {n + 1}.\n#### {n + 1:,}"} for n in range(2000)
    ],
    "math500.jsonl": [
        {"problem": "Half of $x$?", "solution": "-", "answer": "\\frac{x}{2}", "subject": "", "level": 1}
    ],
    "humaneval.jsonl": [
        {
            "task_id": "HumanEval/12",
            "prompt": DOUBLE,
            "entry_point": "double",
            "canonical_solution": "    return 2 * n\n",
            "test": "def check(candidate):\n    assert candidate(2) == 4",
        }
    ],
    "mbpp.jsonl": [
        {
            "task_id": n,
            "text": f"Write {n}.",
            "code": f"f{n} = 1",
            "test_setup_code": "",
            "test_list": [f"assert f{n} == {k}" for k in (1, 2, 3)],
            "challenge_test_list": [],
        }
        for n in range(1, 975)
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files in the layout of the real ones."""
    made = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        (made / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def first(name: str, folder: Path) -> Problem:
    return load_task(name, folder).problems("test", 1)[0]


WRAPPED = (
    f"Write a solution to the following problem and make sure that it passes the tests:\n```python\n{DOUBLE}\n```\n"
)
ASKED = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n```\n"
)
BEGUN = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:\n"
    "```python\n"
)
SHOWN = "".join(
    f"You are an expert Python programmer, and here is your task: Write {n}. Your code should pass these tests:\n\n"
    f"assert f{n} == 1\nassert f{n} == 2\nassert f{n} == 3\n[BEGIN]\n" + (f"f{n} = 1\n[DONE]\n\n" if n < 11 else "")
    for n in (2, 3, 4, 11)
)
# name: user message, answer's beginning, whether the prompt is raw, what the answer ends before
PROMPTS: dict[str, tuple[str, str, bool, tuple[str, ...]]] = {
    "gsm8k": ("Q: What is 1 + 1?\nA: Let's think step by step.", "", False, ("Q:", "</s>", "<|im_end|>")),
    "gsm8k-raw": ("Q: What is 1 + 1?\nA: Let's think step by step.", "", True, ("Q:", "</s>", "<|im_end|>")),
    "math500": ("Problem:\nHalf of $x$?\n\nSolution:", "", False, ("Problem:",)),
    "humaneval": (WRAPPED, "", False, ()),
    "humaneval-raw": (DOUBLE, "", True, ("\nclass", "\ndef", "\n#", "\nif", "\nprint")),
    "humaneval-instruct": (
        WRAPPED,
        f"Here is the completed function:\n```python\n{DOUBLE}\n",
        False,
        ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    ),
    "humaneval-evalplus": (
        f"{ASKED}{DOUBLE}```\n",
        BEGUN,
        False,
        ("\n```\n", "\nif __name__", "\ndef main(", "\nprint("),
    ),
    "mbpp": (SHOWN, "", False, ("[DONE]",)),
    "mbpp-raw": (SHOWN, "", True, ("[DONE]",)),
    "mbpp-instruct": (
        "You are an expert Python programmer, and here is your task:\nWrite 11.\nYour code should pass these tests:\n"
        "assert f11 == 1\nassert f11 == 2\nassert f11 == 3",
        "\n```python\n",
        False,
        ("```",),
    ),
    "mbpp-evalplus": (
        f'{ASKED}"""\nWrite 11.\nassert f11 == 1\n"""\n```\n',
        BEGUN,
        False,
        ("\n```\n", "\nif __name__", "\ndef main(", "\nprint("),
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_the_published_one(name: str, folder: Path) -> None:
    text, prefix, is_raw, stop = PROMPTS[name]
    problem = first(name, folder)
    assert problem.messages == [{"role": "user", "content": text}]
    assert (problem.text, problem.prefix) == (text if is_raw else None, prefix)
    assert load_task(name, folder).stop == stop


def test_worked_examples_come_from_the_training_data(folder: Path) -> None:
    assert {"gsm8k-1shot", "long-gsm8k", "long-gsm8k-raw", "math500-raw", *PROMPTS} == set(PUBLISHED)
    one_shot = first("gsm8k-1shot", folder).messages
    assert [message["role"] for message in one_shot] == ["user", "assistant", "user"]
    assert one_shot[0]["content"].startswith("Q: There are 15 trees") and one_shot[0]["content"].endswith("?\nA:")
    assert one_shot[1]["content"].endswith("21 - 15 = 6. The answer is 6.")
    assert one_shot[2]["content"] == "Q: What is 1 + 1?\nA:"
    for name in ("long-gsm8k", "long-gsm8k-raw"):
        text = first(name, folder).messages[0]["content"]
        *shots, asked = text.split("\n\n")
        assert len(shots) == 5 and len(set(shots)) == 5 and asked == "Question: What is 1 + 1?\nAnswer:"
        training = {f"Question: {row['question']}\nAnswer: {row['answer']}" for row in ROWS["gsm8k_train.jsonl"]}
        assert set(shots) <= training
    minerva = first("math500-raw", folder).text
    assert minerva is not None and minerva.count("I hope it is correct.\n\nProblem:\n") == 4
    assert minerva.startswith("Problem:\nFind the domain of the expression  $\\frac{\\sqrt{x-2}}{\\sqrt{5-x}}$.\n\nSol")
    assert minerva.endswith("I hope it is correct.\n\nProblem:\nHalf of $x$?\n\nSolution:")


def test_examples_of_a_tuning_problem_are_neither_held_out_nor_itself(folder: Path) -> None:
    held = {problem.messages[0]["content"][3:].partition("\n")[0] for problem in _gsm8k("validation", folder)}
    rest = {problem.messages[0]["content"][3:].partition("\n")[0] for problem in _gsm8k("train", folder)}
    assert not held & rest and held | rest == {row["question"] for row in ROWS["gsm8k_train.jsonl"]}
    assert 80 < len(held) < 170  # one in sixteen of 2000
    for split in ("validation", "train"):
        for problem in load_task("long-gsm8k", folder).problems(split, 60):
            *shots, asked = [part.partition("\n")[0][10:] for part in problem.messages[0]["content"].split("\n\n")]
            assert len(shots) == 5 and asked not in shots and not held & set(shots)
            assert (asked in held) == (split == "validation")


def test_a_training_problem_is_not_shown_its_own_solution(tmp_path: Path) -> None:
    rows = [row for row in ROWS["gsm8k_train.jsonl"] if not data.is_held_out(row["question"])][:8]
    (tmp_path / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for problem in load_task("long-gsm8k", tmp_path).problems("train", 8):  # six of eight are drawn for each
        *shots, asked = [part.partition("\n")[0] for part in problem.messages[0]["content"].split("\n\n")]
        assert len(shots) == 5 and asked not in shots


def _gsm8k(split: Any, folder: Path) -> list[Problem]:
    return load_task("gsm8k", folder).problems(split, 5000)


def test_references_and_names_come_back(folder: Path) -> None:
    assert (first("gsm8k", folder).reference, first("gsm8k", folder).user_id) == ("2", "GSM8K/0")
    assert {problem.reference for problem in _gsm8k("train", folder)} >= {"1,999"}
    assert (first("math500", folder).reference, first("math500", folder).user_id) == (
        "\\boxed{\\frac{x}{2}}",
        "MATH500/0",
    )
    assert first("humaneval-instruct", folder).user_id == "HumanEval/12"
    reference = json.loads(first("humaneval", folder).reference or "")
    assert reference == {
        "before": DOUBLE,
        "tests": "def check(candidate):\n    assert candidate(2) == 4\ncheck(double)\n",
        "entry_point": "double",
    }
    assert first("mbpp", folder).user_id == "MBPP/11"
    reference = json.loads(first("mbpp-instruct", folder).reference or "")
    assert (reference["before"], reference["entry_point"]) == ("", None)
    assert reference["tests"] == "\nassert f11 == 1\nassert f11 == 2\nassert f11 == 3"
    splits: tuple[Split, ...] = ("test", "validation", "train")
    ids = {split: {p.user_id for p in load_task("mbpp", folder).problems(split, 999)} for split in splits}
    numbers = {"test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
    assert ids == {split: {f"MBPP/{n}" for n in numbers[split]} for split in numbers}
    every = [first(name, folder).id for name in PUBLISHED]
    assert len(set(every)) == len(every)  # one benchmark's variants are problems of their own


def test_what_minerva_states_in_words_counts_where_no_box_is() -> None:
    judge = StatedAnswer()
    assert judge.is_correct("So 3.\nFinal Answer: The final answer is $[2,5)$. I hope it is correct.", "\\boxed{[2,5)}")
    assert not judge.is_correct("Final Answer: The final answer is $[2,6)$. I hope it is correct.", "\\boxed{[2,5)}")
    assert judge.is_correct("\\boxed{4} The final answer is $5$.", "\\boxed{4}")
    assert judge.extract("The final answer is $\\frac{1}{2}$.\n") == "\\frac{1}{2}"
    assert judge.extract("no number") is None


@real_data
def test_every_reference_solution_of_mathematics_is_right() -> None:
    judge = load_task("math500").judge
    rows = [json.loads(line) for line in (REAL / "math500.jsonl").read_text().split("\n") if line]
    for problem, row in zip(load_task("math500", REAL).problems("test", 500), rows, strict=True):
        stated = f"Final Answer: The final answer is ${row['answer']}$. I hope it is correct."
        assert problem.reference is not None
        assert judge.is_correct(row["solution"], problem.reference) and judge.is_correct(stated, problem.reference)
    task = load_task("gsm8k", REAL)
    answers = [json.loads(line)["answer"] for line in (REAL / "gsm8k_test.jsonl").read_text().split("\n") if line]
    problems = task.problems("test", 2000)
    assert len(answers) == len(problems) == 1319
    for problem, answer in zip(problems, answers, strict=True):
        assert task.is_correct(answer, problem.reference or "")


def test_the_folder_comes_from_the_call_or_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.VARIABLE, "/nowhere")
    assert first("gsm8k", folder).reference == "2"
    monkeypatch.setenv(data.VARIABLE, str(folder))
    assert load_task("gsm8k").problems("test", 1) == [first("gsm8k", folder)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            None,
            r"^data_dir: cannot read '.*gsm8k_test.jsonl': No such file.*; accepted: a folder with 'gsm8k_test.json",
        ),
        ("[1]\n", r"^data_dir: row 1 of '.*': |^data_dir: row 1 of '.*' is list; accepted: an object with question"),
        ('{"question": "1?"}\n', r"row 1 of '.*': column 'answer' is missing; accepted: str$"),
        ('{"question": "1?", "answer": 2}\n', r"row 1 of '.*': column 'answer' is int; accepted: str$"),
        ("\n{\n", r"^data_dir: line 2 of '.*' is not JSON: "),
        ("", r"^data_dir: '.*gsm8k_test.jsonl' has no rows of the test split; accepted: the whole benchmark$"),
    ],
)
def test_bad_data_are_named(text: str | None, line: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "gsm8k_test.jsonl").write_text(text)
    with pytest.raises(InputError, match=line):
        load_task("gsm8k", tmp_path).problems("test", 1)


def test_a_split_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^split of openai/openai_humaneval: .*'validation'; accepted: test$"):
        load_task("humaneval", folder).problems("validation", 1)
    (folder / "few").mkdir()
    for name in ("gsm8k_test.jsonl", "gsm8k_train.jsonl"):
        (folder / "few" / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS[name][:5]))
    with pytest.raises(InputError, match=r"^data_dir: got '5 rows of the train split'; accepted: more than 5$"):
        load_task("long-gsm8k", folder / "few").problems("test", 1)


def test_the_hub_is_asked_once_and_the_download_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    datasets = pytest.importorskip("datasets")
    monkeypatch.delenv(data.VARIABLE, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(
        InputError, match=r"^data_dir: openai/gsm8k \(test\) must be downloaded .*--data-dir.*gsm8k_test"
    ):
        load_task("gsm8k").problems("test", 1)
    assert time.monotonic() - started < 15 and constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("name", "split", "asked"),
    [
        ("gsm8k", "validation", ("openai/gsm8k", "main", "train")),
        ("math500", "test", ("HuggingFaceH4/MATH-500", None, "test")),
        ("humaneval", "test", ("openai/openai_humaneval", None, "test")),
        ("mbpp-instruct", "test", ("google-research-datasets/mbpp", "full", "test")),
        ("mbpp-instruct", "train", ("google-research-datasets/mbpp", "full", "train")),
    ],
)
def test_rows_of_the_hub_are_those_of_the_files(
    name: str, split: Any, asked: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    file = {"gsm8k": "gsm8k_train", "math500": "math500", "humaneval": "humaneval", "mbpp-instruct": "mbpp"}[name]
    calls: list[Any] = []

    def load(path: str, configuration: str | None, split: str) -> list[Any]:
        calls.append((path, configuration, split))
        return ROWS[f"{file}.jsonl"]

    monkeypatch.delenv(data.VARIABLE, raising=False)
    monkeypatch.setattr(data, "_reachable", lambda endpoint: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_task(name).problems(split, 3) == load_task(name, folder).problems(split, 3)
    assert calls == [asked]


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(data.VARIABLE, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"by the package datasets, which is not installed; accepted: --data-dir"):
        load_task("mbpp").problems("test", 1)


@pytest.mark.parametrize("name", ["arith", "gsm8k"])
def test_a_data_dir_that_is_no_folder_is_refused_whatever_the_task(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data_dir: got '.*nowhere'; accepted: a folder with the benchmarks' files$"):
        load_task(name, tmp_path / "nowhere")
