"""HumanEval (Chen et al., arXiv:2107.03374) and MBPP (Austin et al., arXiv:2108.07732), as lm-eval and evalplus ask.

The programs in these data are other people's: they are only ever run in the sandbox of `d3llm_ray.judging`.
"""

from __future__ import annotations

from d3llm_ray.judging import program_reference
from d3llm_ray.tasks.published.data import HUMANEVAL, MBPP, Folder, Row
from d3llm_ray.tasks.published.problem import Style, make_problem
from d3llm_ray.tasks.task import Problem, Split

_EVALPLUS_TASK = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
)
_EVALPLUS_ANSWER = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)
EXPERT = "You are an expert Python programmer, and here is your task:"


def humaneval(style: Style, split: Split, count: int, folder: Folder) -> list[Problem]:
    """Raw: the beginning of the function alone (lm-eval's `humaneval`); chat: as a task (the wrapper of LLaDA's
    evaluation)."""
    rows = HUMANEVAL.rows(split, folder)[:count]
    return [_function(row, row["prompt"] if style == "raw" else _wrapped(row), style) for row in rows]


def humaneval_instruct(split: Split, count: int, folder: Folder) -> list[Problem]:
    """As a task, and the answer begins with the function's beginning: lm-eval's `humaneval_instruct`."""
    return [
        _function(row, _wrapped(row), "chat", f"Here is the completed function:\n```python\n{row['prompt']}\n")
        for row in HUMANEVAL.rows(split, folder)[:count]
    ]


def humaneval_evalplus(split: Split, count: int, folder: Folder) -> list[Problem]:
    """Evalplus' chat prompt; the tests are HumanEval's own."""
    rows = HUMANEVAL.rows(split, folder)[:count]
    return [_function(row, *_evalplus(row["prompt"])) for row in rows]


def mbpp(style: Style, split: Split, count: int, folder: Folder) -> list[Problem]:
    """Three worked examples, tasks 2, 3 and 4: lm-eval's `mbpp`."""
    shots = [f"{_mbpp_task(row)}{row['code']}\n[DONE]\n\n" for row in MBPP.rows("examples", folder)]
    return [_tested(row, f"{''.join(shots)}{_mbpp_task(row)}", style) for row in MBPP.rows(split, folder)[:count]]


def mbpp_instruct(split: Split, count: int, folder: Folder) -> list[Problem]:
    """No worked example, and the answer begins with a fence: lm-eval's `mbpp_instruct` with `--num_fewshot 0`."""
    return [
        _tested(
            row,
            f"{EXPERT}\n{row['text']}\nYour code should pass these tests:\n{_three(row)}",
            "chat",
            "\n```python\n",
        )
        for row in MBPP.rows(split, folder)[:count]
    ]


def mbpp_evalplus(split: Split, count: int, folder: Folder) -> list[Problem]:
    """Evalplus' chat prompt, with the task and its first test as a docstring; tasks and tests are MBPP's own."""
    rows = MBPP.rows(split, folder)[:count]
    return [_tested(row, *_evalplus(f'"""\n{row["text"]}\n{row["test_list"][0]}\n"""')) for row in rows]


def _wrapped(row: Row) -> str:
    task = "Write a solution to the following problem and make sure that it passes the tests:"
    return f"{task}\n```python\n{row['prompt']}\n```\n"


def _evalplus(task: str) -> tuple[str, Style, str]:
    return f"{_EVALPLUS_TASK}\n```\n{task.strip()}\n```\n", "chat", f"{_EVALPLUS_ANSWER}\n```python\n"


def _mbpp_task(row: Row) -> str:
    return f"{EXPERT} {row['text']} Your code should pass these tests:\n\n{_three(row)}\n[BEGIN]\n"


def _three(row: Row) -> str:
    return "\n".join(row["test_list"][:3])


def _function(row: Row, text: str, style: Style, prefix: str = "") -> Problem:
    tests = f"{row['test']}\ncheck({row['entry_point']})\n"
    reference = program_reference(before=row["prompt"], tests=tests, entry_point=row["entry_point"])
    return make_problem(text, reference, row["task_id"], style, prefix)


def _tested(row: Row, text: str, style: Style, prefix: str = "") -> Problem:
    tests = "\n".join([row["test_setup_code"], *row["test_list"]])
    reference = program_reference(before="", tests=tests, entry_point=None)
    return make_problem(text, reference, f"MBPP/{row['task_id']}", style, prefix)
