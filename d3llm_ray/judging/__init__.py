"""Whether an answer is right: a final answer compared, a program run in a sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from d3llm_ray.judging.answers import FinalAnswer
from d3llm_ray.judging.programs import ProgramJudge, program_reference
from d3llm_ray.judging.sandbox.run import ProgramLimits, available_cores, require_sandbox, sandbox_reason

__all__ = [
    "FinalAnswer",
    "Judge",
    "ProgramJudge",
    "ProgramLimits",
    "judge_all",
    "program_reference",
    "require_ready",
    "require_sandbox",
    "sandbox_reason",
]


class Judge(Protocol):
    """What a task needs to judge an answer; it keeps no state and can be sent to any process."""

    def extract(self, text: str) -> str | None:
        """What of an answer is judged, in the form in which it is kept; None where there is nothing to judge."""
        ...

    def is_correct(self, text: str, reference: str) -> bool:
        """Whether the answer `text` is right; `reference` is the problem's, in whatever form this judge reads."""
        ...


def require_ready(judge: Judge) -> None:
    """`InputError`, before any work starts, where this machine cannot judge: programs need the sandbox."""
    if isinstance(judge, ProgramJudge):
        require_sandbox()


def judge_all(judge: Judge, answers: Sequence[tuple[str, str]], workers: int | None = None) -> list[bool]:
    """`is_correct` of every (text, reference), in order; `workers` programs at a time (None: the cores there are).

    Only programs gain by it: each runs in a process of its own, while final answers are compared in this one.
    """
    if not isinstance(judge, ProgramJudge):
        return [judge.is_correct(*answer) for answer in answers]
    with ThreadPoolExecutor(workers or available_cores()) as pool:
        return list(pool.map(lambda answer: judge.is_correct(*answer), answers))
