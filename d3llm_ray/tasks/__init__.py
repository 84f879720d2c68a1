"""Prompts and checked answers: the embedded tasks, the field's benchmarks, and tasks from files."""

from __future__ import annotations

import os
from functools import partial

from d3llm_ray.errors import InputError, unknown
from d3llm_ray.judging import ProgramJudge
from d3llm_ray.paths import expanded, not_uploaded
from d3llm_ray.report import digest
from d3llm_ray.tasks import arith, code
from d3llm_ray.tasks.files import ENDINGS, read_problems, stem
from d3llm_ray.tasks.published import PUBLISHED, published_task
from d3llm_ray.tasks.published.data import Folder
from d3llm_ray.tasks.task import SPLITS, Problem, Split, Task

EMBEDDED = {
    "arith": Task("arith", arith.load_problems),
    "arith-long": Task("arith-long", partial(arith.load_problems, shots=5)),
    "code": Task("code", code.load_problems, judge=ProgramJudge()),
}

__all__ = ["EMBEDDED", "PUBLISHED", "SPLITS", "Problem", "Split", "Task", "load_task", "read_problems"]


def load_task(name_or_file: str, data_dir: Folder = None) -> Task:
    """An embedded task, a published benchmark, or a prompts file as a task (without splits: each is the whole file).

    A benchmark's data are in the folder `data_dir`, else in that of `D3LLM_RAY_DATA`, else at the Hub; they are read
    when its problems are asked for. A file's task is called by its stem and a digest of its problems, so that no two
    tasks share a name. Raises `InputError` for an unknown name, an unreadable file, and a `data_dir` that is no folder.
    """
    if data_dir is not None and not os.path.isdir(folder := expanded(data_dir, "data_dir")):
        accepted = f"a folder with the benchmarks' files{not_uploaded(folder)}"
        raise InputError(f"data_dir: got {folder!r}; accepted: {accepted}")
    if name_or_file in EMBEDDED:
        return EMBEDDED[name_or_file]
    if name_or_file in PUBLISHED:
        return published_task(name_or_file, data_dir)
    if not name_or_file.endswith(ENDINGS):
        accepted = f"a .jsonl, .jsonl.gz or .parquet file of prompts{not_uploaded(name_or_file)}"
        raise unknown("task", name_or_file, [*EMBEDDED, *PUBLISHED, accepted])
    problems = read_problems(name_or_file)
    name = f"{stem(name_or_file)}-{digest([problem.id for problem in problems])}"
    return Task(name, lambda _split, count: problems[:count])
