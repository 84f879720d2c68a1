"""One measurement: what a model with a decoder reached on a task, and the answers behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from d3llm_ray.errors import IncompleteError, first_failures, require

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile

# Fields of a row that follow from its samples, and the samples.
COMPUTED = {"accuracy", "accuracy_low", "accuracy_high", "correct", "problems", "tokens", "forwards", "tpf", "tps"}
COMPUTED |= {"seconds", "errors", "aup", "samples"}


@dataclass(frozen=True)
class EvaluatedSample:
    """One problem and its answer. `tokens` are those before the first stop token; `forwards` those it took part in.

    A problem that could not be answered has the reason in `error`, no text, and counts as wrong. `user_id` is what a
    task file calls it. `token_ids` are the tokens counted, `prompt` is the prompt as the model read it, special tokens
    by their names; each is None where it is not known, as of a chat behind a URL.
    """

    problem_id: str
    text: str
    answer: str | None
    reference: str
    correct: bool
    tokens: int
    forwards: int
    prompt_tokens: int
    finish_reason: str
    user_id: str | int | float | None = None
    error: str | None = None
    token_ids: tuple[int, ...] | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class EvaluationRow:
    """The figures of one (model, decoder, task, settings).

    `model` and `decoder` are labels; `settings` is the content of a decoding settings file: the preset under
    `decoder`, and every setting of it.
    `accuracy` and its 95 % Wilson interval are in percent of all `problems`; `errors` is how many of these have no
    answer and so count as wrong. `tpf` is the sum of tokens over the sum of forwards of
    all problems; `tps` is tokens over `seconds`, the wall clock of the whole run after `warmup` problems; `aup` is
    None until the rows of a report are scored together. A row from a server has its URL in `endpoint`, and the
    `concurrency` of the requests; how many the server decodes together, `max_batch_size`, is None: it does not tell.
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
    max_batch_size: int | None
    top_p: float = 1.0
    endpoint: str | None = None
    concurrency: int | None = None
    errors: int = 0
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
        tpf=tokens / forwards if forwards else 0.0,  # no problem has an answer
        tps=tokens / seconds,
        seconds=seconds,
        errors=sum(sample.error is not None for sample in samples),
        samples=tuple(samples),
        **labels,
    )


def labels_of(row: EvaluationRow) -> dict[str, Any]:
    """What `summarise` takes beside samples and seconds to make such a row again."""
    return {item.name: getattr(row, item.name) for item in fields(row) if item.name not in COMPUTED}


def unanswered(samples: Iterable[EvaluatedSample]) -> list[str]:
    """The problems without an answer: their place in the task (from 1), the user's name for them, and the reason."""
    places = ((place, sample) for place, sample in enumerate(samples, start=1) if sample.error is not None)
    return [
        f"problem {place}{'' if sample.user_id is None else f' ({sample.user_id!r})'}: {sample.error}"
        for place, sample in places
    ]


def check_answered(failures: Sequence[str], where: object) -> None:
    """Raise `IncompleteError`, which names the first few `failures`, if there are any; `where` holds all else."""
    if failures:
        raise IncompleteError(
            f"problems: answers are missing: {len(failures)}, counted as wrong; the others are in {where}: "
            f"{first_failures(failures)}"
        )


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion, as fractions (Wilson 1927).

    Unlike the normal approximation it stays within 0 to 1 and is not empty when all or none are correct.
    """
    require(count > 0 and 0 <= correct <= count, "correct", f"{correct} of {count}", "0 to all of at least one problem")
    share, spread = correct / count, Z95**2 / count
    centre = share + spread / 2
    half = Z95 * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return (0.0 if correct == 0 else low), (1.0 if correct == count else high)
