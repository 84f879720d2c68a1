"""The embedded task: short word problems with a step-by-step solution and a checked final answer.

Questions and solutions are written in several phrasings, chosen at random. A model trained on them
is honestly uncertain which phrasing comes next, as real language models are, and so decodes few
tokens a forward until it is distilled on one teacher's own choices.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from d3llm_ray.tasks.task import Message, Problem, Split

MAX_TOTAL = 60
NAMES = ("Tom", "Ann", "Ben", "Mia", "Sam", "Eva", "Leo", "Zoe")
ITEMS = ("apples", "books", "coins", "cards", "shells", "stamps", "marbles", "pens")

QUESTION_OPENINGS = ("{name} has {start} {items}.", "There are {start} {items} in the box of {name}.")
QUESTION_STEPS = {
    "add": ("{name} buys {n} more.", "Then {name} finds {n} {items}.", "{name} gets {n} from a friend."),
    "sub": ("{name} gives away {n}.", "Then {name} loses {n} {items}.", "{name} sells {n} of them."),
    "double": ("Then the number doubles.", "{name} gets as many again."),
}
QUESTION = "How many {items} does {name} have now?"

OPENINGS = ("{name} starts with {start} {items}.", "At first there are {start} {items}.", "We begin with {start}.", "")
STEPS = {
    "add": (
        "{a} + {n} = {b}.",
        "{name} gets {n} more, so {a} + {n} = {b}.",
        "Adding {n} gives {a} + {n} = {b}.",
        "Now there are {a} + {n} = {b} {items}.",
        "After that we count {a} + {n} = {b}.",
    ),
    "sub": (
        "{a} - {n} = {b}.",
        "{name} has {n} less, so {a} - {n} = {b}.",
        "Taking {n} leaves {a} - {n} = {b}.",
        "Now there are {a} - {n} = {b} {items}.",
        "After that we count {a} - {n} = {b}.",
    ),
    "double": (
        "{a} + {a} = {b}.",
        "Twice as many is {a} + {a} = {b}.",
        "Doubling gives {a} + {a} = {b}.",
        "Now there are {a} + {a} = {b} {items}.",
        "After that we count {a} + {a} = {b}.",
    ),
}
ENDINGS = ("So the answer is {b}.", "{name} has {b} {items} now.", "That makes {b} in all.", "")


@dataclass(frozen=True)
class ArithProblem:
    """One word problem: who, what, the start and the steps (operation, operand)."""

    name: str
    items: str
    start: int
    steps: tuple[tuple[str, int], ...]
    question: str

    @property
    def totals(self) -> list[int]:
        """The running totals, one a step."""
        totals, total = [], self.start
        for operation, n in self.steps:
            total = {"add": total + n, "sub": total - n, "double": 2 * total}[operation]
            totals.append(total)
        return totals

    @property
    def answer(self) -> int:
        return self.totals[-1]

    @property
    def split(self) -> Split:
        """Split by content: the numbers and operations alone decide, whatever the wording."""
        content = f"{self.start}|{self.steps}".encode()
        bucket = hashlib.sha256(content).digest()[0]
        return "test" if bucket < 16 else "validation" if bucket < 32 else "train"

    def solution(self, rng: random.Random) -> str:
        """A worked solution in a random phrasing, ending in the checked line `#### <answer>`."""
        words = {"name": self.name, "items": self.items, "start": self.start}
        sentences = [rng.choice(OPENINGS).format(**words)]
        before = self.start
        for (operation, n), after in zip(self.steps, self.totals, strict=True):
            sentences.append(rng.choice(STEPS[operation]).format(a=before, n=n, b=after, **words))
            before = after
        sentences.append(rng.choice(ENDINGS).format(b=before, **words))
        return " ".join(sentence for sentence in sentences if sentence) + f"\n#### {before}"


def _steps(rng: random.Random, start: int, count: int) -> tuple[tuple[str, int], ...]:
    steps, total = [], start
    for _ in range(count):
        operations = ["add"] * 3 * (total <= MAX_TOTAL - 2) + ["sub"] * 3 * (total >= 3)
        operations += ["double"] * (2 <= total <= MAX_TOTAL // 2)
        operation = rng.choice(operations)
        n = 0
        if operation == "add":
            n = rng.randint(2, min(20, MAX_TOTAL - total))
        elif operation == "sub":
            n = rng.randint(2, min(20, total - 1))
        steps.append((operation, n))
        total = {"add": total + n, "sub": total - n, "double": 2 * total}[operation]
    return tuple(steps)


def problems(split: Split, seed: int = 0, max_steps: int = 3) -> Iterator[ArithProblem]:
    """An endless, reproducible stream of problems of one split, without repeats of a whole question."""
    rng = random.Random(f"arith/{split}/{seed}")
    seen: set[int] = set()  # 8-byte hashes: 0.07 kB a problem instead of 0.2 kB for its text
    while True:
        name, items, start = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(3, 40)
        steps = _steps(rng, start, rng.randint(1, max_steps))
        words = {"name": name, "items": items, "start": start}
        sentences = [rng.choice(QUESTION_OPENINGS).format(**words)]
        sentences += [rng.choice(QUESTION_STEPS[operation]).format(n=n, **words) for operation, n in steps]
        question = " ".join([*sentences, QUESTION.format(**words)])
        problem = ArithProblem(name, items, start, steps, question)
        key = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest())
        if problem.split == split and key not in seen:
            seen.add(key)
            yield problem


def vocabulary_texts() -> Iterator[str]:
    """Every text fragment the task can produce, with placeholders filled: what a tokenizer must know."""
    phrases = [*QUESTION_OPENINGS, QUESTION, *OPENINGS, *ENDINGS]
    phrases += [phrase for group in (QUESTION_STEPS, STEPS) for choices in group.values() for phrase in choices]
    for phrase in phrases:
        yield phrase.format(name=NAMES[0], items=ITEMS[0], start=0, n=0, a=0, b=0)
    yield from (*NAMES, *ITEMS)
    yield from (str(number) for number in range(100))
    yield "\n#### 0"


def load_problems(split: Split, count: int, shots: int = 0) -> Iterator[Problem]:
    """The first `count` problems of a split, each behind `shots` worked examples from the training split."""
    examples = problems("train", seed=1)
    rng = random.Random(f"arith/{split}/shots")
    for number, problem in enumerate(islice(problems(split), count)):
        messages: list[Message] = []
        for _ in range(shots):
            example = next(examples)
            messages.append({"role": "user", "content": example.question})
            messages.append({"role": "assistant", "content": example.solution(rng)})
        messages.append({"role": "user", "content": problem.question})
        yield Problem(f"{split}-{number:05d}", messages, str(problem.answer))
