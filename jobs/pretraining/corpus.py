"""The embedded tasks as training text: whole problems, worked examples before them, and bare sums."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from d3llm_ray.tasks import arith, code
from d3llm_ray.tasks.tokenizer import build_tokenizer

TASKS = {"arith": arith, "code": code}

FEW_SHOT_EVERY = 20  # one batch in so many carries worked examples, so that `arith-long` is in distribution
FEW_SHOT_SHRINK = 4  # and has fewer rows, for its prompts are that much longer


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    response: list[int]  # ends with the stop token
    # Response positions of what follows from the problem alone: sums; a function's name, its numbers and words.
    targets: list[int]


def prompt_length(example: Example) -> int:
    return len(example.prompt)


def row_length(example: Example) -> int:
    return len(example.prompt) + len(example.response)


def vocabulary_texts(tasks: Sequence[str]) -> Iterator[str]:
    """What a tokenizer of these tasks must know."""
    return chain.from_iterable(TASKS[name].vocabulary_texts() for name in tasks)


class Corpus:
    """An endless source of tokenised training examples in random phrasings, of each of `tasks` equally often.

    `arith` is always among them: bare sums are taken from it.
    """

    def __init__(self, seed: int, max_steps: int, tasks: Sequence[str] = ("arith",)) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = build_tokenizer(vocabulary_texts(tasks))
        self.sums = arith.problems("train", seed=seed, max_steps=max_steps)
        self.streams: list[Iterator[arith.ArithProblem | code.CodeProblem]] = [self.sums]
        if "code" in tasks:
            self.streams.append(code.problems("train", seed=seed))
        (self.equals,) = self.encode(" =")
        self.waiting: dict[int, list[Example]] = {}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _turns(self) -> tuple[arith.ArithProblem | code.CodeProblem, str, str]:
        """A problem, its question and an answer."""
        stream: Iterator[arith.ArithProblem | code.CodeProblem]
        stream = self.sums if len(self.streams) == 1 else self.rng.choice(self.streams)
        problem = next(stream)
        return problem, problem.question, problem.solution(self.rng)

    def _targets(self, problem: arith.ArithProblem | code.CodeProblem, response: list[int]) -> list[int]:
        if isinstance(problem, arith.ArithProblem):
            return [position + 1 for position, token in enumerate(response) if token == self.equals]
        copied = {problem.name, problem.word, str(problem.n), str(problem.m)}
        return [at for at, token in enumerate(response) if str(self.tokenizer.decode([token])).strip(" '[") in copied]

    def example(self, shots: int) -> Example:
        """One problem behind `shots` worked examples."""
        messages: list[dict[str, str]] = []
        for _ in range(shots):
            _, question, answer = self._turns()
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        problem, question, answer = self._turns()
        messages.append({"role": "user", "content": question})
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        response = self.encode(answer)
        return Example(self.encode(text), [*response, self.tokenizer.eos_token_id], self._targets(problem, response))

    def groups(self, step: int, count: int, size: int, length: Callable[[Example], int]) -> list[list[Example]]:
        """`count` micro-batches of `size` examples, each of one `length`, so that attention needs no padding.

        Examples of other lengths wait for their turn: over time the stream is unbiased.
        """
        if step % FEW_SHOT_EVERY == 0:
            return [
                [self.example(self.rng.randint(1, 5)) for _ in range(size // FEW_SHOT_SHRINK)] for _ in range(count)
            ]
        groups: list[list[Example]] = []
        while len(groups) < count:
            example = self.example(0)
            bucket = self.waiting.setdefault(length(example), [])
            bucket.append(example)
            if len(bucket) == size:
                groups.append(self.waiting.pop(length(example)))
        return groups

    def fact(self) -> list[int]:
        """One step without its story, such as ` Adding 7 gives 12 + 7 = 19`; ends in the sum."""
        problem = next(self.sums)
        before = [problem.start, *problem.totals]
        step = self.rng.randrange(len(problem.steps))
        operation, n = problem.steps[step]
        words = {"name": problem.name, "items": problem.items, "a": before[step], "n": n, "b": ""}
        sentence = self.rng.choice(arith.STEPS[operation]).format(**words)
        return self.encode(sentence[: sentence.index("=") + 1] + f" {before[step + 1]}")
