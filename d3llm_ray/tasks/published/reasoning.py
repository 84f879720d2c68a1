"""GSM8K (Cobbe et al., arXiv:2110.14168) and MATH-500 (Lightman et al., arXiv:2305.20050), with lm-eval's prompts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from d3llm_ray.errors import require
from d3llm_ray.judging import FinalAnswer
from d3llm_ray.tasks.published.data import GSM8K, MATH500, Folder, Row
from d3llm_ray.tasks.published.minerva import EXAMPLES
from d3llm_ray.tasks.published.problem import Style, make_problem
from d3llm_ray.tasks.task import Problem, Split

SHOTS = 5
SHOT_SEED = 1234  # lm-eval's, of the generator that draws the worked examples
_STATED = re.compile(r"[Tt]he final answer is:?\s*(.+?)\.?\s*(?:I hope it is correct|\n|\Z)")

# The first worked example of Wei et al., arXiv:2201.11903, table 20: D2F's evaluation shows this one.
_COT_QUESTION = (
    "There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are done, there "
    "will be 21 trees. How many trees did the grove workers plant today?"
)
_COT_ANSWER = (
    "There are 15 trees originally. Then there were 21 trees after some more were planted. So there must have been "
    "21 - 15 = 6. The answer is 6."
)


@dataclass(frozen=True)
class StatedAnswer(FinalAnswer):
    """As `FinalAnswer`; an answer in the words of Minerva's examples, "The final answer is X", is X where no box is."""

    def extract(self, text: str) -> str | None:
        return super().extract(_boxed(text))

    def is_correct(self, text: str, reference: str) -> bool:
        return super().is_correct(_boxed(text), reference)


def _boxed(text: str) -> str:
    """The text, or where it has no box what it states in words, in one."""
    *_, stated = (None, *_STATED.finditer(text))
    return text if stated is None or "\\boxed" in text else f"\\boxed{{{stated[1].strip('$ ')}}}"


def gsm8k(style: Style, split: Split, count: int, folder: Folder) -> list[Problem]:
    """No worked example: lm-eval's `gsm8k_cot_zeroshot`."""
    return [
        make_problem(f"Q: {row['question']}\nA: Let's think step by step.", _solution(row), _name(split, number), style)
        for number, row in enumerate(GSM8K.rows(split, folder)[:count])
    ]


def gsm8k_one_shot(split: Split, count: int, folder: Folder) -> list[Problem]:
    """One worked example as a turn of its own: lm-eval's `gsm8k_cot` with `--num_fewshot 1 --fewshot_as_multiturn`."""
    before = [
        {"role": "user", "content": f"Q: {_COT_QUESTION}\nA:"},
        {"role": "assistant", "content": _COT_ANSWER},
    ]
    return [
        make_problem(f"Q: {row['question']}\nA:", _solution(row), _name(split, number), "chat", before=before)
        for number, row in enumerate(GSM8K.rows(split, folder)[:count])
    ]


def long_gsm8k(style: Style, split: Split, count: int, folder: Folder) -> list[Problem]:
    """Five worked examples of the training data, others for every problem: lm-eval's `gsm8k`.

    They are those that lm-eval draws for the test problems in one process. The other splits draw from what is not held
    out, and never the problem itself.
    """
    rows = GSM8K.rows(split, folder)[:count]
    pool = GSM8K.rows("examples" if split == "test" else "train", folder)
    require(len(pool) > SHOTS, "data_dir", f"{len(pool)} rows of the train split", f"more than {SHOTS}")
    draw, problems = Random(SHOT_SEED), []
    for number, row in enumerate(rows):
        drawn = draw.sample(pool, SHOTS + (split == "train"))
        shots = [example for example in drawn if example != row][:SHOTS]
        texts = [f"Question: {example['question']}\nAnswer: {example['answer']}\n\n" for example in shots]
        question = f"{''.join(texts)}Question: {row['question']}\nAnswer:"
        problems.append(make_problem(question, _solution(row), _name(split, number), style))
    return problems


def math500(style: Style, shots: int, split: Split, count: int, folder: Folder) -> list[Problem]:
    """The first `shots` of Minerva's four worked examples: lm-eval's `minerva_math500`."""
    examples = [f"Problem:\n{problem}\n\nSolution: {solution}\n\n" for problem, solution in EXAMPLES[:shots]]
    return [
        make_problem(
            f"{''.join(examples)}Problem:\n{row['problem']}\n\nSolution:",
            f"\\boxed{{{row['answer']}}}",
            f"MATH500/{number}",
            style,
        )
        for number, row in enumerate(MATH500.rows(split, folder)[:count])
    ]


def _solution(row: Row) -> str:
    """The final number: what stands behind the last `####`."""
    return str(row["answer"]).rpartition("####")[2].strip()


def _name(split: Split, number: int) -> str:
    return f"GSM8K/{'' if split == 'test' else f'{split}/'}{number}"
