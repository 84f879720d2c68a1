"""The one check of answers: numbers as strictly as ever, all else as mathematics, and no answer hangs a worker."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d3llm_ray import mathematics
from d3llm_ray.errors import InputError
from d3llm_ray.mathematics import same_mathematics
from d3llm_ray.tasks import load_task

TASK = load_task("arith")
MATH = Path(__file__).parents[3] / "shared" / "benchmarks" / "math500.jsonl"

# Reference, answers that are right, answers that are wrong: judged by hand.
BOXED = [
    (r"\frac{1}{2}", [r"\frac{1}{2}", r"\frac12", r"\dfrac{1}{2}", "1/2", "0.5", ".5"], ["2", "1", "12"]),
    (r"-\frac{3}{4}", [r"\frac{-3}{4}", "-0.75"], [r"\frac{3}{4}", "4", "-4"]),
    ("x^2+2", ["x^2+2", "2 + x^2", "x^{2}+2"], ["2", "x^2-2", "x^2", "x+2"]),
    (r"3\sqrt{2}", [r"3\sqrt{2}", r"\sqrt{18}", r"3 \sqrt2"], ["2", "3", r"2\sqrt{3}"]),
    (r"2\pi", [r"2\pi", r"\pi \cdot 2"], ["2", r"\pi"]),
    (r"\frac{\sqrt{3}}{2}", [r"\frac{\sqrt3}{2}", r"\frac12\sqrt3"], ["2", r"\frac{3}{2}"]),
    ("[0,1)", ["[0, 1)", r"\left[0,1\right)"], ["(0,1]", "[0,1]", "1", "01"]),
    (r"(-\infty,3]", [r"(-\infty, 3]", r"\left(-\infty, 3\right]"], ["3", r"(-\infty,3)", r"[3,\infty)"]),
    (r"\left(3, \frac{\pi}{2}\right)", [r"(3,\frac{\pi}{2})"], ["2", r"(\frac{\pi}{2},3)"]),
    ("(3,4)", ["(3, 4)"], ["(4,3)", "4", "34", "3"]),
    ("1,2", ["1,2", "2,1", "1, 2"], ["12", "2", "1", "1,3"]),
    ("6-5i", ["6 - 5i", "-5i+6"], ["6+5i", "5", "6"]),
    ("p - q", ["p-q", "-q+p"], ["q-p", "p"]),
    ("2x", ["2x", "x+x"], ["2", "x"]),
    ("y = 2x + 3", ["y=2x+3"], ["3", "y=2x"]),
    ("x=5", ["5", "x = 5"], ["6", "x=6"]),
    ("2^{10}", ["1024", "2^{10}"], ["10", "2"]),
    (r"90^\circ", [r"90^\circ", "90"], ["9", r"60^\circ"]),
    (r"10\%", [r"10\%", "10"], ["20", "1"]),
    (r"\$18.90", ["18.90", "18.9", r"\$18.90"], ["18", "1890"]),
    ("4210_5", ["4210_{5}"], ["5", "4210_6", "4210"]),
    (r"\text{Evelyn}", ["Evelyn", r"\text{Evelyn}", r"\textbf{evelyn}"], [r"\text{Evan}", "1"]),
    (r"\text{(C)}", [r"\text{(C)}", "(C)", "C"], ["D", "(A)"]),
    ("even", ["even", r"\text{even}"], ["odd"]),
    (r"\binom{1}{2}", [r"\binom{1}{2}"], ["2", r"\binom{5}{2}"]),
    ("5", ["x=5", r"\frac{10}{2}", r"5\text{ cm}", "5.0", r"\$5"], ["x=6", r"\frac{5}{2}", "-5", "−5", "5.1"]),
    (r"11,\! 111", ["11111", "11,111"], ["111", "11"]),
]  # fmt: skip

# Reference, text of a solution, whether it is right.
TEXTS = [
    ("7.5", "#### 7.50", True),
    ("7.5", "#### 7.05", False),
    ("5", "#### 5/2", False),
    (r"\frac{5}{2}", "#### 5/2", True),
    ("2.5", "#### 5/2", True),
    ("5", "#### 5 - that is all", True),
    ("5", "#### 5!", True),
    (r"\frac{1}{2}", r"The answer is $\frac{1}{2}$.", True),
    (r"\frac{1}{2}", "so it is 1/2", True),
    (r"\frac{1}{2}", "so it is 2", False),
    ("2", r"The answer is $\frac{1}{2}$.", False),
    ("3", r"The area is $3\pi$.", False),
    ("8", "$x = 2^3$", True),
    ("3", "$x = 2^3$", False),
    ("7 apples", "#### 7", True),
    ("Tom has 7 apples.", r"\boxed{7}", True),
    ("$1,042", "so $1,042.", True),
    ("so \\boxed{x+1}, as shown", r"\boxed{1+x}", True),
    ("-5", "#### −5", True),
    ("5", "#### Step 1: add\n\nSo \\boxed{5}.", True),
    ("5", "#### Step 1\n2 + 3 = 5.\n#### That is all 9", False),
    ("5", "#### Step 1\n2 + 3 = 5.", True),
    ("5", "#### The answer is 5", True),
    ("2", "#### x^2+2", False),
    ("x^2+2", "#### 2+x^2\n", True),
    ("7", "no number  ", False),
]


@pytest.mark.parametrize(
    ("text", "answer"),
    [("#### 2+X^2\n", "2+x^2"), (r"\boxed{(3, 4)}", "(3,4)"), ("no number \n", None), (r"\boxed{\text{East}}", "east"),
    ("so $1,042.50.", "1042.5"), ("#### \\$1,042", "1042"), (r"the half, $\frac{1}{2}$.", None)],
)  # fmt: skip
def test_answers_that_are_shown(text: str, answer: str | None) -> None:
    assert TASK.extract(text) == answer


@pytest.mark.parametrize(("reference", "right", "wrong"), BOXED, ids=[case[0] for case in BOXED])
def test_answers_in_a_box(reference: str, right: list[str], wrong: list[str]) -> None:
    for answer in right:
        assert TASK.is_correct(rf"so it is \boxed{{{answer}}}.", reference), answer
    for answer in wrong:
        assert not TASK.is_correct(rf"so it is \boxed{{{answer}}}.", reference), answer


@pytest.mark.parametrize(("reference", "text", "right"), TEXTS)
def test_answers_at_the_end_of_a_solution(reference: str, text: str, right: bool) -> None:
    assert TASK.is_correct(text, reference) == right


@pytest.mark.skipif(not MATH.is_file(), reason="needs MATH-500")
def test_the_references_of_math500() -> None:
    """Each is right against itself, also where it is written otherwise, and wrong against the next problem's."""
    answers = [json.loads(line)["answer"] for line in MATH.read_text(encoding="utf-8").splitlines()]
    box = r"So the answer is \boxed{%s}.".__mod__
    assert [answer for answer in answers if not TASK.is_correct(box(answer), answer)] == []
    spelt = {
        answer: answer.replace(r"\frac", r"\dfrac").replace(r"\left", "").replace(r"\right", "") for answer in answers
    }
    changed = [(one, other) for one, other in spelt.items() if one != other]
    assert len(changed) > 50
    assert [pair for pair in changed if not TASK.is_correct(box(pair[1]), pair[0])] == []
    taken = [pair for pair in zip(answers[::3], answers[1::3], strict=True) if TASK.is_correct(box(pair[0]), pair[1])]
    assert taken == [("7", "7")]  # which is right


def _before(text: str) -> str | None:
    """The check of numbers before mathematics was judged, word for word, but that 7.50 is 7.5."""
    if marked := re.findall(r"####\s*(-?[\d,.]+)", text):
        answer = marked[-1]
    elif "\\boxed{" in text:
        answer = text[text.rfind("\\boxed{") + 7 : text.rfind("}")]
    elif numbers := re.findall(r"-?\d[\d,]*(?:\.\d+)?", text):
        answer = numbers[-1]
    else:
        return None
    answer = re.sub(r"[\s,$]", "", answer.lower()).rstrip(".")
    answer = re.sub(r"(\d)\.0+$", r"\1", answer)
    return answer.rstrip("0") if re.fullmatch(r"-?\d+\.\d+", answer) else answer


_numbers = st.builds(
    lambda sign, whole, grouped, decimals: sign + (f"{whole:,}" if grouped else str(whole)) + decimals,
    st.sampled_from(["", "", "-"]),
    st.integers(0, 2_000_000) | st.integers(0, 30),
    st.booleans(),
    st.sampled_from(["", "", ".0", ".5", ".50", ".05", ".25"]),
)
_solutions = st.sampled_from(
    ["#### {}", "#### {}.", "#### {} apples", "####{}", "#### ${}", "1 + 1 = 2\n#### {}", "\\boxed{{{}}}",
     "\\boxed{{${}}}", "The answer is {}.", "{}", "so 3 + 4 = {}", "costs ${} in all", "{} km", "{}%", "**{}**"]
)  # fmt: skip
_references = st.sampled_from(
    ["{}", "${}", "{} apples", "{}%", "a sum.\n#### {}", "\\boxed{{{}}}", "The answer is {}."]
)


@given(_solutions, _numbers, _references, _numbers)
@settings(max_examples=400, deadline=None)
def test_numbers_are_judged_as_before(solution: str, answer: str, form: str, known: str) -> None:
    for number in (known, answer, "-" + answer.lstrip("-"), f"{answer}0"):  # the last three: often the same, or almost
        text, reference = solution.format(answer), form.format(number)
        assert TASK.is_correct(text, reference) == (_before(text) == _before(reference)), (text, reference)


def test_numbers_are_never_computed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d3llm_ray.judging.answers.same_mathematics", lambda *_: pytest.fail("a number was parsed"))
    assert TASK.is_correct("#### 1,042", "1042") and not TASK.is_correct("#### 1042.1", "1042")
    assert not TASK.is_correct(r"\boxed{7}", "70") and not TASK.is_correct("so 7.", "Tom has 8 apples.")


def test_no_answer_hangs_a_worker_and_any_thread_may_ask() -> None:
    started = time.monotonic()
    hostile = [r"\boxed{9^{9^{9^9}}}", rf"\boxed{{{'(' * 600}}}"]
    sane = [
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{\frac{1}{3}}", "0.5", False),
        (r"\boxed{x+y}", "y+x", True),
    ]
    with ThreadPoolExecutor(4) as pool:
        bad = [pool.submit(TASK.is_correct, text, "5") for text in hostile]
        good = [pool.submit(TASK.is_correct, text, reference) for text, reference, _ in sane * 3]
        assert [future.result() for future in good] == [right for *_, right in sane] * 3
        assert not any(future.result() for future in bad)
    assert time.monotonic() - started < 60  # 3 s of CPU time, on however busy a machine


def test_a_process_that_was_killed_is_started_again_and_a_missing_package_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert same_mathematics("a+b", "b+a")
    judge: Any = mathematics._judge()
    judge.kill()
    judge.wait()
    assert same_mathematics("a+c", "c+a")
    mathematics._judge.cache_clear()
    monkeypatch.setattr(mathematics, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="reference: .*pip install math-verify"):
        same_mathematics("a+d", "d+a")
