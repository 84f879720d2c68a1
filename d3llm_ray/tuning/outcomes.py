"""What a measurement keeps of each problem, so that two of them can be compared problem by problem."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from d3llm_ray.evaluation.rows import EvaluatedSample, unanswered

Outcomes = npt.NDArray[np.int64]  # (problems, 3): right or not, tokens, forwards


def outcomes_of(samples: Iterable[EvaluatedSample]) -> Outcomes:
    rows = [(int(sample.correct), sample.tokens, sample.forwards) for sample in samples]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def unanswered_at(samples: Sequence[EvaluatedSample], numbers: Sequence[int]) -> list[str]:
    """`unanswered` of samples of the problems of these numbers, which need not be a task's first ones nor in order."""
    known = dict(zip(numbers, samples, strict=True))
    other = replace(samples[0], error=None)
    return unanswered(known.get(number, other) for number in range(max(numbers) + 1))


def write_outcomes(outcomes: Outcomes) -> str:
    """One line: Ray Tune keeps text as it is, and would draw a histogram of a list."""
    return json.dumps(outcomes.tolist(), separators=(",", ":"))


def read_outcomes(text: str) -> Outcomes:
    return np.array(json.loads(text), dtype=np.int64).reshape(-1, 3)


def accuracy_of(outcomes: Outcomes) -> float:
    """In percent."""
    return 100.0 * float(outcomes[:, 0].mean())


def tpf_of(outcomes: Outcomes) -> float:
    """Sum of tokens over sum of forwards; 0 without a forward."""
    tokens, forwards = outcomes[:, 1].sum(), outcomes[:, 2].sum()
    return float(tokens / forwards) if forwards else 0.0


def deal(count: int, shards: int, seed: int) -> list[list[int]]:
    """Problem numbers 0 to `count` - 1, shuffled and cut into at most `shards` shards that differ by at most one."""
    numbers = list(range(count))
    if shards > 1:
        random.Random(f"tune/{seed}").shuffle(numbers)
    return [dealt for part in range(shards) if (dealt := numbers[part::shards])]
