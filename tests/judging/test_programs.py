"""Programs are taken out of answers as the evaluation scripts do, and judged by their tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from d3llm_ray.errors import InputError
from d3llm_ray.judging import ProgramJudge, ProgramLimits, judge_all, program_reference, sandbox_reason
from d3llm_ray.judging.programs import sanitise

BENCHMARKS = Path(__file__).parents[2].parent / "shared" / "benchmarks"
JUDGE = ProgramJudge()
BEFORE = 'import math\n\n\ndef double(x):\n    """Twice x."""\n'
DOUBLE = program_reference(before=BEFORE, tests="assert double(2) == 4 and double(0) == 0", entry_point="double")
needs_sandbox = pytest.mark.skipif(sandbox_reason() is not None, reason=f"no sandbox: {sandbox_reason()}")


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\nx = 1\n```\nThis is it.", "x = 1"),
        ("Sure:\n\n```Python\nx = 1\n```\n```python\ny\n```", "x = 1"),
        ("Sure:\n```py\r\nx = 1\r\n```", "x = 1"),
        ("Sure:\n```\nx = 1\n```\nDone.", "x = 1"),
        ("```python\nx = 1", "x = 1"),  # cut off at the most tokens
        ("    return 1\n```\nThe prompt opened the block.", "    return 1"),
        ("    return 1\n```\nAn example:\n```python\nf()\n```", "    return 1"),
        ("x = 1", "x = 1"),
        ("", None),
        ("```python\n\n```", None),
    ],
)
def test_the_program_in_an_answer(text: str, program: str | None) -> None:
    assert JUDGE.extract(text) == program


@needs_sandbox
@pytest.mark.parametrize(
    "text",
    [
        "    return 2 * x\n",
        "    return 2 * x\n\nThis doubles the number.",
        "    return 2 * x\n\n\ndef other(:\n",
        "return 2 * x",  # lost its indentation
        "y = 2 * x\nreturn y",  # on every line
        "if x == 0:\n        return 0\n    return 2 * x",  # on the first
        "if x == 0:\n    return 0\nreturn 2 * x\n\nDone, as you see.",
        "def double(x):\n    return 2 * x",
        "BY = 2\ndef double(x):\n    return 2 * x * BY // BY",
        "Here is the function:\n\ndef double(x):\n    return 2 * x\n\nIt doubles.",
        "Sure!\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles.",
        "```python\n    return 2 * x\n```",
        "```python\nfrom math import floor\n\ndef double(x):\n    return floor(2 * x)\n\nprint(double(3))\n```",
        "    return helper(x)\n\n\ndef helper(x):\n    return 2 * x\n\n\nif __name__ == '__main__':\n    1 / 0",
    ],
)
def test_right_answers_in_many_forms(text: str) -> None:
    assert JUDGE.is_correct(text, DOUBLE)
    assert not JUDGE.is_correct(text.replace("2 * x", "3 * x"), DOUBLE)


@needs_sandbox
@pytest.mark.parametrize(
    "text", ["", "I cannot do that.", "    pass", "def triple(x):\n    return 2 * x", "\0", "#" * 70_000]
)
def test_wrong_answers(text: str) -> None:
    assert not JUDGE.is_correct(text, DOUBLE)


@pytest.mark.parametrize("code", ["(" * 5000, "-" * 60_000 + "1", "a." * 20_000 + "a", "[" * 90 + "]" * 90 + "\n" * 9])
def test_text_that_strains_the_parser_is_left_to_the_sandbox(code: str) -> None:
    assert isinstance(sanitise(code, "", None), str)


def test_a_reference_of_another_form_is_named() -> None:
    for reference in ("42", '{"tests": ""}', "[]"):
        with pytest.raises(InputError, match="reference: got .*program_reference"):
            JUDGE.is_correct("x = 1", reference)


@needs_sandbox
def test_many_answers_keep_their_order() -> None:
    texts = ["return 2 * x", "return x", "return x + x", "", "return x << 1", "return 2"]
    assert judge_all(JUDGE, [(text, DOUBLE) for text in texts]) == [True, False, True, False, True, False]


def rows(name: str) -> list[dict[str, Any]]:
    file = BENCHMARKS / name
    if not file.is_file():
        pytest.skip(f"no {file}")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def human_eval() -> list[tuple[str, str]]:
    """Every canonical solution with its reference."""
    return [
        (
            row["canonical_solution"],
            program_reference(
                before=row["prompt"],
                tests=f"{row['test']}\ncheck({row['entry_point']})",
                entry_point=row["entry_point"],
            ),
        )
        for row in rows("humaneval.jsonl")
    ]


def mbpp() -> list[tuple[str, str]]:
    """The solutions of the 500 test problems."""
    return [
        (
            row["code"],
            program_reference(
                before="", tests="\n".join([row["test_setup_code"], *row["test_list"]]), entry_point=None
            ),
        )
        for row in rows("mbpp.jsonl")
        if 11 <= row["task_id"] <= 510
    ]


def hollow(solution: str) -> str:
    """A solution whose functions return nothing of what they did."""
    return "\n".join(
        line[: len(line) - len(line.lstrip())] + "return None" if line.lstrip().startswith("return") else line
        for line in solution.splitlines()
    )


@needs_sandbox
@pytest.mark.parametrize("problems", [human_eval, mbpp])
def test_a_sample_of_the_benchmarks(problems: Any) -> None:
    some = problems()[3::100][:5]
    assert all(judge_all(JUDGE, some))
    assert not any(judge_all(JUDGE, [(hollow(solution), reference) for solution, reference in some]))


@needs_sandbox
@pytest.mark.slow
@pytest.mark.parametrize(("problems", "count"), [(human_eval, 164), (mbpp, 500)])
def test_every_canonical_solution_passes_and_none_that_is_hollow(problems: Any, count: int) -> None:
    """Problem 123 of MBPP takes more than 1 s of processor time, the only one."""
    every, judge = problems(), ProgramJudge(ProgramLimits(cpu_s=20, wall_s=120))
    assert len(every) == count
    assert [number for number, passed in enumerate(judge_all(judge, every)) if not passed] == []
    changed = [(hollow(solution), reference) for solution, reference in every[:: count // 160]]
    assert [number for number, passed in enumerate(judge_all(JUDGE, changed)) if passed] == []
