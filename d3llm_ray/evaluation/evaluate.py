"""Decode a task's problems with one model and decoder, check the answers and count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from d3llm_ray.decoding import Decoder, DiffusionLLM, Output, Prompt, WholePrompt, decoding_settings
from d3llm_ray.device import timed
from d3llm_ray.errors import require
from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow, summarise
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
    samples = [_sample(task, problem, output) for problem, output in zip(problems, outputs, strict=True)]
    return summarise(
        samples,
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


def prompt_of(problem: Problem) -> Prompt:
    """The prompt that `generate` takes for a problem: by the chat template or as it is, with the answer's beginning."""
    if problem.text is None and not problem.prefix:
        return problem.messages
    return WholePrompt(problem.messages if problem.text is None else problem.text, problem.prefix)


def _sample(task: Task, problem: Problem, output: Output) -> EvaluatedSample:
    assert problem.reference is not None
    return EvaluatedSample(
        problem_id=problem.id,
        text=output.text,
        answer=task.extract(output.text) if output.error is None else None,
        reference=problem.reference,
        correct=output.error is None and task.is_correct(output.text, problem.reference),
        tokens=len(output.token_ids),
        forwards=output.forwards,
        prompt_tokens=output.prompt_tokens,
        finish_reason=output.finish_reason,
        user_id=problem.user_id,
        error=output.error,
    )
