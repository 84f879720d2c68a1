"""The embedded task of programs: a sentence asks for a short Python function, and its tests say whether it is right.

Instructions and answers are written in several phrasings, chosen at random, as those of `arith` are. A function's body
stands on the line of its `def`: the word-level tokenizer has no indentation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from d3llm_ray.judging import program_reference
from d3llm_ray.tasks.task import Problem, Split

NAMES = ("f", "g", "work", "solve", "change", "compute")
WORDS = ("red", "blue", "moon", "star", "tree", "bird", "fish", "sun")
LARGEST = 99  # of the numbers in an instruction
TESTS = 4
OPENINGS = (
    "Write a function {name}({parameters}) that {task}.",
    "Please define {name}({parameters}), which {task}.",
    "I need a Python function {name}({parameters}) that {task}.",
)
ANSWERS = (
    "def {name}({parameters}): return {body}",
    "```python\ndef {name}({parameters}): return {body}\n```",
    "Here it is:\n```python\ndef {name}({parameters}): return {body}\n```",
)


@dataclass(frozen=True)
class FunctionKind:
    """One kind of function: its parameters, what it is asked to do, and bodies that do it.

    `{n}`, `{m}` and `{word}` stand for what a problem is made of; a family without one of them ignores it.
    """

    parameters: str
    tasks: tuple[str, ...]
    bodies: tuple[str, ...]
    largest: int = LARGEST  # of `{n}`


FAMILIES = {
    "add": FunctionKind("x", ("adds {n} to x", "returns x plus {n}"), ("x + {n}", "{n} + x")),
    "subtract": FunctionKind("x", ("subtracts {n} from x", "returns x minus {n}"), ("x - {n}",)),
    "multiply": FunctionKind("x", ("multiplies x by {n}", "returns {n} times x"), ("x * {n}", "{n} * x")),
    "linear": FunctionKind(
        "x",
        ("multiplies x by {m} and then adds {n}", "returns {n} plus {m} times x"),
        ("x * {m} + {n}", "{n} + {m} * x"),
    ),
    "two": FunctionKind(
        "x, y", ("returns the sum of x and y minus {n}", "adds x and y and subtracts {n}"), ("x + y - {n}",)
    ),
    "product": FunctionKind("x, y", ("returns the product of x and y plus {n}",), ("x * y + {n}", "{n} + x * y")),
    "each-add": FunctionKind(
        "items",
        ("adds {n} to each of the items", "returns a list of all items plus {n}"),
        ("[item + {n} for item in items]", "[{n} + item for item in items]"),
    ),
    "each-times": FunctionKind(
        "items",
        ("multiplies each of the items by {n}", "returns a list of all items times {n}"),
        ("[item * {n} for item in items]", "[{n} * item for item in items]"),
    ),
    "larger": FunctionKind(
        "items",
        ("keeps the items that are larger than {n}", "returns a list of the items above {n}"),
        ("[item for item in items if item > {n}]",),
    ),
    "sum": FunctionKind("items", ("returns the sum of the items plus {n}",), ("sum(items) + {n}", "{n} + sum(items)")),
    "largest": FunctionKind("items", ("returns the largest of the items minus {n}",), ("max(items) - {n}",)),
    "drop": FunctionKind(
        "items", ("leaves out the first {n} items", "returns the items after the first {n}"), ("items[{n}:]",), 5
    ),
    "repeat": FunctionKind("text", ("repeats the text {n} times",), ("text * {n}", "{n} * text"), 12),
    "after": FunctionKind(
        "text",
        ("puts {word} after the text {m} times", "repeats {word} {m} times behind the text"),
        ("text + '{word}' * {m}", "text + {m} * '{word}'"),
    ),
    "before": FunctionKind(
        "text", ("puts {word} before the text without its first {m} letters",), ("'{word}' + text[{m}:]",)
    ),
    "upper": FunctionKind(
        "text", ("returns the text in upper case, followed by {word}",), ("text.upper() + '{word}'",)
    ),
    "length": FunctionKind(
        "text", ("returns the length of the text plus {n}",), ("len(text) + {n}", "{n} + len(text)")
    ),
}


@dataclass(frozen=True)
class CodeProblem:
    """One function to write: what it is called, its family, what it is made of, and the words that ask for it."""

    name: str
    family: str
    n: int
    m: int
    word: str
    question: str

    @property
    def split(self) -> Split:
        """Split by content: what the function computes alone decides, whatever its name and the wording."""
        body = FAMILIES[self.family].bodies[0].format(n=self.n, m=self.m, word=self.word)
        bucket = hashlib.sha256(f"{self.family}|{body}".encode()).digest()[0]
        return "test" if bucket < 40 else "validation" if bucket < 80 else "train"

    def solution(self, rng: random.Random) -> str:
        """A right answer in a random phrasing."""
        family = FAMILIES[self.family]
        body = rng.choice(family.bodies).format(n=self.n, m=self.m, word=self.word)
        return rng.choice(ANSWERS).format(name=self.name, parameters=family.parameters, body=body)

    @property
    def tests(self) -> str:
        """Statements that raise where the function is wrong; always the same ones."""
        family = FAMILIES[self.family]
        rng = random.Random(f"code/tests/{self}")
        body = family.bodies[0].format(n=self.n, m=self.m, word=self.word)
        function: Callable[..., object] = eval(f"lambda {family.parameters}: {body}")  # of our own families
        lines = []
        for _ in range(TESTS):
            values = [self._argument(rng, parameter) for parameter in family.parameters.split(", ")]
            lines.append(f"assert {self.name}({', '.join(map(repr, values))}) == {function(*values)!r}")
        return "\n".join(lines)

    def _argument(self, rng: random.Random, parameter: str) -> object:
        if parameter == "items":  # with the numbers about `n`, where what is larger begins
            return [*(rng.randint(-120, 120) for _ in range(rng.randint(3, 6))), self.n, self.n + 1]
        if parameter == "text":
            return "".join(rng.choice("abcdefghij") for _ in range(rng.randint(4, 12)))
        return rng.randint(-99, 99)


def problems(split: Split, seed: int = 0) -> Iterator[CodeProblem]:
    """An endless, reproducible stream of problems of one split; questions may come again, a few thousand on."""
    rng = random.Random(f"code/{split}/{seed}")
    while True:
        key = rng.choice(list(FAMILIES))
        family = FAMILIES[key]
        name, word = rng.choice(NAMES), rng.choice(WORDS)
        n, m = rng.randint(2, family.largest), rng.randint(2, 9)
        task = rng.choice(family.tasks).format(n=n, m=m, word=word)
        question = rng.choice(OPENINGS).format(name=name, parameters=family.parameters, task=task)
        problem = CodeProblem(name, key, n, m, word, question)
        if problem.split == split:
            yield problem


def vocabulary_texts() -> Iterator[str]:
    """Every text fragment the task can produce, with placeholders filled: what a tokenizer must know."""
    for family in FAMILIES.values():
        for phrase in OPENINGS:
            for task in family.tasks:
                yield phrase.format(
                    name=NAMES[0], parameters=family.parameters, task=task.format(n=0, m=0, word=WORDS[0])
                )
        for answer in ANSWERS:
            for body in family.bodies:
                yield answer.format(
                    name=NAMES[0], parameters=family.parameters, body=body.format(n=0, m=0, word=WORDS[0])
                )
    yield from (text for word in (*NAMES, *WORDS) for text in (word, f"'{word}"))
    yield from (text for number in range(LARGEST + 1) for text in (str(number), f"[{number}"))


def load_problems(split: Split, count: int) -> Iterator[Problem]:
    """The first `count` problems of a split, no question twice; fewer where a split has no more to ask."""
    seen: set[str] = set()
    for problem in islice(problems(split), 100 * count):
        if len(seen) == count:
            return
        if problem.question not in seen:
            reference = program_reference(before="", tests=problem.tests, entry_point=problem.name)
            yield Problem(f"{split}-{len(seen):05d}", [{"role": "user", "content": problem.question}], reference)
            seen.add(problem.question)
