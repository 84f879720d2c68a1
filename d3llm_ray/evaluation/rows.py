"""One measurement: what a model with a decoder reached on a task, and the answers behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from d3llm_ray.errors import require

_Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


@dataclass(frozen=True)
class EvaluatedSample:
    """One answered problem. `tokens` are those before the first stop token; `forwards` those it took part in."""

    problem_id: str
    text: str
    answer: str | None
    reference: str
    correct: bool
    tokens: int
    forwards: int
    prompt_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class EvaluationRow:
    """The figures of one (model, decoder, task, settings).

    `model` and `decoder` are labels; `settings` is the content of a decoding settings file: the preset under
    `decoder`, and every setting of it.
    `accuracy` and its 95 % Wilson interval are in percent; `tpf` is the sum of tokens over the sum of forwards of
    all problems; `tps` is tokens over `seconds`, the wall clock of the whole run after `warmup` problems; `aup` is
    None until the rows of a report are scored together.
    """

    model: str
    decoder: str
    task: str
    settings: dict[str, Any]
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    correct: int
    problems: int
    tokens: int
    forwards: int
    tpf: float
    tps: float
    seconds: float
    max_tokens: int
    temperature: float
    seed: int
    warmup: int
    max_batch_size: int
    aup: float | None = None
    samples: tuple[EvaluatedSample, ...] = field(default=(), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The row of a report: everything but the samples."""
        values = asdict(self)
        del values["samples"]
        return values


def summarise(samples: Sequence[EvaluatedSample], seconds: float, **labels: Any) -> EvaluationRow:
    """Add up the samples of one run of `seconds`; `labels` are the remaining fields of `EvaluationRow`.

    Raises:
        InputError: no samples.
    """
    require(bool(samples), "problems", 0, "at least one problem")
    correct, count = sum(sample.correct for sample in samples), len(samples)
    tokens = sum(sample.tokens for sample in samples)
    forwards = sum(sample.forwards for sample in samples)
    low, high = wilson_interval(correct, count)
    return EvaluationRow(
        accuracy=100.0 * correct / count,
        accuracy_low=100.0 * low,
        accuracy_high=100.0 * high,
        correct=correct,
        problems=count,
        tokens=tokens,
        forwards=forwards,
        tpf=tokens / forwards,
        tps=tokens / seconds,
        seconds=seconds,
        samples=tuple(samples),
        **labels,
    )


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion, as fractions (Wilson 1927).

    Unlike the normal approximation it stays within 0 to 1 and is not empty when all or none are correct.
    """
    require(count > 0 and 0 <= correct <= count, "correct", f"{correct} of {count}", "0 to all of at least one problem")
    share, spread = correct / count, _Z95**2 / count
    centre = share + spread / 2
    half = _Z95 * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return (0.0 if correct == 0 else low), (1.0 if correct == count else high)
