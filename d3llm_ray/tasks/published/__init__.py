"""The field's benchmarks by name: their data, prompts, stop strings and judges as published (docs/tasks.md)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from d3llm_ray.judging import FinalAnswer, Judge, ProgramJudge, ProgramLimits
from d3llm_ray.tasks.published import programs, reasoning
from d3llm_ray.tasks.published.data import Folder
from d3llm_ray.tasks.task import Problem, Task

# One of the canonical solutions takes more than the default second.
_MBPP = ProgramJudge(ProgramLimits(cpu_s=10, wall_s=30))
_COT_STOP = ("Q:", "</s>", "<|im_end|>")
_QUESTION_STOP = ("Question:", "</s>", "<|im_end|>")
_MATH_STOP = ("Problem:",)
_FUNCTION_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_EVALPLUS_STOP = ("\n```\n", "\nif __name__", "\ndef main(", "\nprint(")

PUBLISHED: dict[str, tuple[Callable[..., list[Problem]], Judge, tuple[str, ...]]] = {
    "gsm8k": (partial(reasoning.gsm8k, "chat"), FinalAnswer(), _COT_STOP),
    "gsm8k-raw": (partial(reasoning.gsm8k, "raw"), FinalAnswer(), _COT_STOP),
    "gsm8k-1shot": (reasoning.gsm8k_one_shot, FinalAnswer(), _COT_STOP),
    "long-gsm8k": (partial(reasoning.long_gsm8k, "chat"), FinalAnswer(), _QUESTION_STOP),
    "long-gsm8k-raw": (partial(reasoning.long_gsm8k, "raw"), FinalAnswer(), _QUESTION_STOP),
    "math500": (partial(reasoning.math500, "chat", 0), reasoning.StatedAnswer(), _MATH_STOP),
    "math500-raw": (partial(reasoning.math500, "raw", 4), reasoning.StatedAnswer(), _MATH_STOP),
    "humaneval": (partial(programs.humaneval, "chat"), ProgramJudge(), ()),
    "humaneval-raw": (partial(programs.humaneval, "raw"), ProgramJudge(), _FUNCTION_STOP),
    "humaneval-instruct": (programs.humaneval_instruct, ProgramJudge(), _FUNCTION_STOP),
    "humaneval-evalplus": (programs.humaneval_evalplus, ProgramJudge(), _EVALPLUS_STOP),
    "mbpp": (partial(programs.mbpp, "chat"), _MBPP, ("[DONE]",)),
    "mbpp-raw": (partial(programs.mbpp, "raw"), _MBPP, ("[DONE]",)),
    "mbpp-instruct": (programs.mbpp_instruct, _MBPP, ("```",)),
    "mbpp-evalplus": (programs.mbpp_evalplus, _MBPP, _EVALPLUS_STOP),
}


def published_task(name: str, folder: Folder) -> Task:
    """One of `PUBLISHED`, with its data in `folder`, in the folder of `D3LLM_RAY_DATA`, or at the Hub.

    The data are read when problems are asked for; `InputError` then if they cannot be had.
    """
    load, judge, stop = PUBLISHED[name]
    return Task(name, partial(load, folder=folder), judge, stop)
