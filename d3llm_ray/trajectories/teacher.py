"""The teacher: decodes a batch of prompts one token a step, retrying wrong answers at rising temperatures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from d3llm_ray.decoding import Completion, Decoder, DiffusionLLM, Event, Request, decoder
from d3llm_ray.decoding.rules import family_rules
from d3llm_ray.errors import DecodingError, InputError
from d3llm_ray.models import read_configs
from d3llm_ray.tasks import Task
from d3llm_ray.trajectories.prompts import Prompt, attempt_seed
from d3llm_ray.trajectories.settings import TrajectorySettings


class EngineLike(Protocol):
    """What the ladder needs of `decoding.Engine`."""

    def submit(self, request: Request) -> int: ...

    def step(self) -> list[Event]: ...


@dataclass(frozen=True)
class Attempt:
    """One decoding of one prompt."""

    number: int  # 0-based rung of the ladder
    request: Request
    completion: Completion


@dataclass(frozen=True)
class Verdict:
    """What a task says about a response; `is_correct` is None where there is no reference."""

    answer: str | None
    is_correct: bool | None


Judge = Callable[[int, Completion], Verdict]  # index of the prompt, its response


def climb(
    engine: EngineLike, ladders: Sequence[Sequence[Request]], judge: Judge
) -> Iterator[tuple[int, Attempt, Verdict]]:
    """Decode `ladders[i][0]`, and while the answer is wrong `ladders[i][1]` and so on; the last attempt stands.

    Yields (i, attempt, verdict) once for every ladder, in order of completion. A retry joins the running batch in
    the forward after its answer was found wrong, so that no slot waits for the slowest row. Nothing else may
    use the engine meanwhile.
    """
    running: dict[int, tuple[int, int]] = {}  # request id -> ladder, rung
    for index, ladder in enumerate(ladders):
        running[engine.submit(ladder[0])] = (index, 0)
    while running:
        for event in engine.step():
            if event.error is not None:
                raise DecodingError(event.error)
            if event.completion is None:
                continue
            index, rung = running.pop(event.request_id)
            verdict = judge(index, event.completion)
            if verdict.is_correct is False and rung + 1 < len(ladders[index]):
                running[engine.submit(ladders[index][rung + 1])] = (index, rung + 1)
            else:
                yield index, Attempt(rung, ladders[index][rung], event.completion), verdict


def teacher_decoder(settings: TrajectorySettings) -> Decoder:
    """The finest order of reveals there is, block by block (`TrajectorySettings.decoding`)."""
    _, family = read_configs(settings.teacher)
    options = settings.decoding(settings.block_size, family_rules(family).remasking == "entropy")
    return decoder(options.pop("decoder"), **options)


class Teacher:
    """A loaded teacher that turns prompts into rows; plain Python, one in each Ray actor."""

    def __init__(self, settings: TrajectorySettings, task: Task) -> None:
        if settings.device == "cpu":
            torch.set_num_threads(1)  # one CPU an actor: more threads would fight with the other actors
        self.settings, self.task = settings, task
        self.llm = DiffusionLLM.from_pretrained(
            settings.teacher,
            decoder=teacher_decoder(settings),
            dtype=settings.dtype,
            device=settings.device,
            max_batch_size=settings.batch_size,
        )

    def rows(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """One row for every prompt, in the order of `prompts`.

        A prompt that cannot be decoded (longer than the context, say) gives a row with its `prompt_id`, `messages`
        and `error`, and does not disturb its neighbours.
        """
        rows: dict[str, dict[str, Any]] = {}
        accepted: list[Prompt] = []
        ladders: list[list[Request]] = []
        for prompt in prompts:
            try:
                ladders.append(self._ladder(prompt))
                accepted.append(prompt)
            except InputError as error:
                rows[prompt.prompt_id] = {
                    "prompt_id": prompt.prompt_id,
                    "messages": prompt.messages,
                    "reference": prompt.reference,
                    "error": str(error),
                }

        def judge(index: int, completion: Completion) -> Verdict:
            text, reference = self.llm.decode(completion.token_ids), accepted[index].reference
            return Verdict(
                self.task.extract(text), None if reference is None else self.task.is_correct(text, reference)
            )

        for index, attempt, verdict in climb(self.llm.engine, ladders, judge):
            rows[accepted[index].prompt_id] = _row(accepted[index], attempt, verdict)
        return [rows[prompt.prompt_id] for prompt in prompts]

    def _ladder(self, prompt: Prompt) -> list[Request]:
        """The requests of every attempt; `InputError` when the engine cannot decode the prompt."""
        ids = self.llm.encode(prompt.messages)
        temperatures = self.settings.ladder if prompt.reference is not None else self.settings.ladder[:1]
        ladder = [
            Request(
                prompt_ids=ids,
                max_tokens=self.settings.max_tokens,
                temperature=temperature,
                seed=attempt_seed(self.settings.seed, prompt.prompt_id, attempt),
            )
            for attempt, temperature in enumerate(temperatures)
        ]
        self.llm.engine.check(ladder[0])
        return ladder


def _row(prompt: Prompt, attempt: Attempt, verdict: Verdict) -> dict[str, Any]:
    request, completion = attempt.request, attempt.completion
    return {
        "prompt_id": prompt.prompt_id,
        "messages": prompt.messages,
        "prompt_ids": list(request.prompt_ids),
        "response_ids": completion.response_ids,
        "reveal_step": completion.reveal_steps,
        "reveal_entropy": completion.reveal_entropies,
        "reference": prompt.reference,
        "answer": verdict.answer,
        "is_correct": verdict.is_correct,
        "attempt": attempt.number,
        "temperature": request.temperature,
        "forwards": completion.forwards,
        "seed": request.seed,
    }
