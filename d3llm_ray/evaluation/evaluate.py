"""Decode a task's problems with one model and decoder, check the answers and count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d3llm_ray.decoding import Decoder, DiffusionLLM, Output, decoding_settings
from d3llm_ray.device import timed
from d3llm_ray.errors import require
from d3llm_ray.evaluation.prompts import prompt_of, rendered
from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow, summarise
from d3llm_ray.judging import judge_all
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import Problem, Task


def evaluate(
    llm: DiffusionLLM,
    task: Task,
    problems: Sequence[Problem],
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
    warmup: int = 1,
    decoder: str | Path | Decoder | None = None,
    top_p: float = 1.0,
    **overrides: Any,
) -> EvaluationRow:
    """Measure `llm` on `problems` of `task`; no Ray, no files.

    All problems are decoded in one call, `max_batch_size` of `llm` at a time. The first `warmup` of them are decoded
    once before the clock starts, so that compilation and allocation are not timed. `decoder` and `overrides`, its
    settings, are those of `generate`. A problem that cannot be answered (refused by the chat template, too long, logits
    that are not finite) costs its own answer: its sample has the reason, and it counts as wrong.
    The row's `model` is the family's name; callers that know a better label replace it.

    Raises:
        InputError: no problems, a problem without a reference, or an unknown decoder setting.
    """
    require(bool(problems), "problems", 0, "at least one problem")
    check_references(problems)
    chosen = llm.decoder(decoder, **overrides)
    progress = progress or Progress()
    prompts = [prompt_of(problem) for problem in problems]
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "decoder": chosen}
    options |= {"top_p": top_p, "errors": "return", "stop": task.stop}
    if warmup:
        llm.generate(prompts[:warmup], **options)
    device = llm.model.embed_tokens.weight.device
    with progress.stage(f"evaluate {chosen.name}", len(prompts), "problem"):
        seconds, outputs = timed(device, lambda: llm.generate(prompts, progress=progress, **options))
    return summarise(
        judged(task, problems, [_given(llm, output) for output in outputs]),
        seconds,
        model=llm.family.name,
        decoder=chosen.name,
        task=task.name,
        settings=decoding_settings(chosen),
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        top_p=top_p,
        warmup=min(warmup, len(prompts)),
        max_batch_size=llm.engine.max_batch_size,
    )


def check_references(problems: Iterable[Problem]) -> None:
    """Raise `InputError` for a problem that no answer can be checked against."""
    for problem in problems:
        require(problem.reference is not None, f"problem {problem.id}: reference", None, "the expected answer")


@dataclass(frozen=True)
class GivenAnswer:
    """An answer before it is judged, however it was come by; fields as of `EvaluatedSample`."""

    text: str
    tokens: int
    forwards: int
    prompt_tokens: int
    finish_reason: str
    token_ids: tuple[int, ...] | None = None
    prompt: str | None = None
    error: str | None = None


def judged(task: Task, problems: Sequence[Problem], answers: Sequence[GivenAnswer]) -> list[EvaluatedSample]:
    """A sample a problem. Programs are run as many at a time as this process may use threads."""
    given = [number for number, answer in enumerate(answers) if answer.error is None]
    texts = [(answers[number].text, problems[number].reference or "") for number in given]
    verdicts = dict(zip(given, judge_all(task.judge, texts, torch.get_num_threads()), strict=True))
    return [
        EvaluatedSample(
            problem_id=problem.id,
            answer=task.extract(answer.text) if answer.error is None else None,
            reference=problem.reference or "",
            correct=verdicts.get(number, False),
            user_id=problem.user_id,
            **vars(answer),
        )
        for number, (problem, answer) in enumerate(zip(problems, answers, strict=True))
    ]


def _given(llm: DiffusionLLM, output: Output) -> GivenAnswer:
    return GivenAnswer(
        text=output.text,
        tokens=len(output.token_ids),
        forwards=output.forwards,
        prompt_tokens=output.prompt_tokens,
        finish_reason=output.finish_reason,
        token_ids=tuple(output.token_ids),
        prompt=rendered(llm.tokenizer, output.prompt_ids),
        error=output.error,
    )
