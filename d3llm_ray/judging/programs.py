"""Answers that are programs: taken out of the text, put before their tests, run in the sandbox."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from d3llm_ray.errors import InputError
from d3llm_ray.judging.sandbox.run import ProgramLimits, run_program

LONGEST = 64 * 1024  # characters of an answer that are looked at
_FENCE = re.compile(r"^[ \t]*```[ \t]*(?P<language>\w*)[^\n]*\n?", re.M)
_INDENT = "    "
_START = re.compile(r"^(?:def|class|import|from|async|@)\b|^@", re.M)
_FIELDS = {"before", "tests", "entry_point"}


def program_reference(*, before: str, tests: str, entry_point: str | None) -> str:
    """The reference of a problem whose answer is a program, as `ProgramJudge` reads it: JSON of the three.

    `before` is what precedes the answer in the program ("" where the answer is the whole program), `tests` the code
    that runs after it and raises where the answer is wrong, `entry_point` the function that the answer must define.
    """
    return json.dumps({"before": before, "tests": tests, "entry_point": entry_point})


@dataclass(frozen=True)
class ProgramJudge:
    """Judges a program by its tests, in the sandbox: right where the tests run to their end without an exception."""

    limits: ProgramLimits = field(default_factory=ProgramLimits)

    def extract(self, text: str) -> str | None:
        """The program in an answer: its first fenced block, else the whole text; None where that is blank.

        A text that only closes a block began inside one: its prompt or the answer's prefix opened it.
        """
        fences = list(_FENCE.finditer(text))
        code = text
        if fences:
            before = text[: fences[0].start()]
            is_open = bool(before.strip()) and not fences[0]["language"] and len(fences) % 2 == 1
            ends = [fence.start() for fence in fences[1:]] + [len(text)]
            code = before if is_open else text[fences[0].end() : ends[0]]
        return code.rstrip() if code.strip() else None

    def is_correct(self, text: str, reference: str) -> bool:
        """Whether the program in `text` passes the tests in `reference` (see `program_reference`).

        `InputError` for a reference of another form, and where this machine has no sandbox.
        """
        problem = _read(reference)
        code = self.extract(text)
        if code is None or len(code) > LONGEST:
            return False
        program = sanitise(code, problem["before"] or "", problem["entry_point"])
        return run_program(program, problem["tests"] or "", self.limits).passed


def sanitise(code: str, before: str, entry_point: str | None) -> str:
    """`before` and the answer's code as one program, without the prose behind the code, nor before it.

    A continuation that lost its indentation gets it back, on its first line or on all. As published evaluations do
    (code_eval behind a sanitiser), the longest beginning that is Python counts; where nothing is, the text as it is.
    """
    least = len(before.splitlines())
    for candidates in _candidates(code, before, entry_point):
        kept = [text for candidate in candidates if (text := _longest_program(candidate, least)) is not None]
        if kept:
            return max(kept, key=len)
    return before + code


def _candidates(code: str, before: str, entry_point: str | None) -> Iterator[list[str]]:
    """Readings of an answer, the likeliest first; of those that stand together, the one that keeps most of it."""
    is_whole = entry_point is not None and re.search(rf"^(?:async )?def {re.escape(entry_point)}\b", code, re.M)
    if before and not is_whole:
        if code.startswith((" ", "\t", "\n", "\r")):
            yield [before + code]
        first, *rest = code.lstrip().splitlines()
        second = next((line for line in rest if line.strip()), "")
        deep = len(_INDENT) * (2 if first.endswith(":") else 1)
        if len(second) - len(second.lstrip()) < deep:  # every line lost its indentation, not the first alone
            rest = [_INDENT + line for line in rest]
        yield [before + "\n".join([_INDENT + first, *rest])]
    start = _START.search(code)
    wholes = [code, code[start.start() :]] if start else [code]  # with and without what stands before a first statement
    yield [f"{before}\n{whole}" if before else whole for whole in wholes]


def _longest_program(text: str, least: int) -> str | None:
    """`text` without the last lines that keep it from being Python; None where no more than `least` lines are left."""
    lines = text.splitlines()
    while len(lines) > least:
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            # Python cannot be right beyond the line it complains of, but a block it left open begins before.
            wrong = error.lineno or len(lines)
            del lines[min(max(wrong - 1, least), len(lines) - 1) :]
        except (ValueError, RecursionError, MemoryError):  # null bytes; nested too deeply for the parser
            return None
        else:
            return "\n".join(lines) + "\n"
    return None


def _read(reference: str) -> dict[str, str | None]:
    try:
        problem = json.loads(reference)
    except ValueError:
        problem = None
    if not isinstance(problem, dict) or set(problem) != _FIELDS:
        raise InputError(f"reference: got {reference[:80]!r}; accepted: what `program_reference` gives")
    return problem
