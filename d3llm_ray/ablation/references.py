"""Reference answers as training rows: the teacher's prompts with solutions that it did not write."""

from __future__ import annotations

import random
from itertools import islice

import pyarrow.compute as pc

from d3llm_ray.config import Settings
from d3llm_ray.errors import InputError, require
from d3llm_ray.models import load_tokenizer, read_configs
from d3llm_ray.models.chat import encode_text
from d3llm_ray.tasks import arith
from d3llm_ray.trajectories.schema import build_table, file_metadata, read_trajectories
from d3llm_ray.trajectories.shards import ShardWriter
from d3llm_ray.trajectories.storage import Location

ROWS_PER_FILE = 50_000
PROMPTS_SEARCHED = 20  # times the number of rows: a folder may hold only some of the task's first prompts


def write_reference_answers(trajectories: str, teacher: str, output: Location, settings: Settings) -> None:
    """Write, for every row of `trajectories` whose answer is not wrong, the embedded task's own solution.

    `prompt_id`, prompt and canvas stay the row's, so that a student of either sees the same prompts in the same
    batches behind the same windows. A solution is a random choice among all phrasings, a function of `prompt_id`; the
    stop token ends it and fills the canvas, as in a teacher's row. There is no order of reveals.

    Raises:
        InputError: prompts that are not the embedded task's, or a solution that is longer than its canvas.
    """
    rows = read_trajectories(trajectories)
    rows = rows.filter(pc.fill_null(rows["is_correct"], True)).to_pylist()
    known = _problems(rows)
    family = read_configs(teacher)[1]
    tokenizer = load_tokenizer(teacher, family)
    if tokenizer is None:
        raise InputError(f"teacher: {teacher!r} has no tokenizer; accepted: one, or reference_trajectories")
    written = []
    for row in rows:
        problem, canvas = known[_question(row)], len(row["response_ids"])
        solution = problem.solution(random.Random(row["prompt_id"]))
        ids = [*encode_text(tokenizer, solution, control=False), family.eos_token_id]
        require(
            len(ids) <= canvas, "trajectories", f"{canvas} response positions", f"at least {len(ids)}, a solution's"
        )
        written.append(
            {
                "prompt_id": row["prompt_id"],
                "messages": row["messages"],
                "prompt_ids": row["prompt_ids"],
                "response_ids": ids + [family.eos_token_id] * (canvas - len(ids)),
                "reference": row["reference"],
                "answer": str(problem.answer),
                "is_correct": True,
            }
        )
    generation = {"reference_answers": True, "trajectories": trajectories, "teacher": teacher}
    writer = ShardWriter(output, file_metadata(family.name, generation), ROWS_PER_FILE)
    writer.write(build_table(written))
    writer.finish(settings, {})


def _question(row: dict[str, object]) -> str:
    messages = row["messages"]
    return messages[-1]["content"] if isinstance(messages, list) and messages else ""


def _problems(rows: list[dict[str, object]]) -> dict[str, arith.ArithProblem]:
    """The embedded task's problem of every row, by its question."""
    wanted = {_question(row) for row in rows}
    known: dict[str, arith.ArithProblem] = {}
    for problem in islice(arith.problems("train"), PROMPTS_SEARCHED * len(rows)):
        if problem.question in wanted:
            known[problem.question] = problem
            if len(known) == len(wanted):
                return known
    raise InputError(
        f"trajectories: {len(wanted) - len(known)} of {len(wanted)} prompts are not the embedded task's; accepted: "
        "its training prompts, reference_trajectories for others, or variants without reference answers"
    )
