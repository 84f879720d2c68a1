"""The teacher: decodes prompts in a continuous batch, retrying wrong answers at rising temperatures.

A teacher trajectory is what it leaves: tokens, and the forward that revealed each of them (d3LLM, arXiv:2601.07568).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from d3llm_ray.decoding import Completion, DiffusionLLM, Event, Request
from d3llm_ray.models import read_configs
from d3llm_ray.tasks import Task
from d3llm_ray.trajectories.plan import teacher_decoder
from d3llm_ray.trajectories.prompts import Prompt, attempt_seed, reason_of
from d3llm_ray.trajectories.schema import TrajectoryRow
from d3llm_ray.trajectories.settings import TrajectorySettings

Key = TypeVar("Key")


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


@dataclass(frozen=True)
class Outcome(Generic[Key]):
    """How a ladder ended: with the attempt that stands, or with the reason why there is none."""

    key: Key
    attempt: Attempt | None = None
    verdict: Verdict | None = None
    error: str | None = None


class Ladders(Generic[Key]):
    """Attempts at many prompts in one running batch; nothing else may use the engine.

    A ladder's first request is decoded, and while the answer is wrong the next; the last attempt stands. A retry
    joins the batch in the forward after its answer was found wrong, so that no slot waits for the slowest row.
    `judge` may raise: then its ladder alone ends in an error, as one whose logits are not finite does.
    """

    def __init__(self, engine: EngineLike, judge: Callable[[Key, Completion], Verdict]) -> None:
        self._engine, self._judge = engine, judge
        self._running: dict[int, tuple[Key, Sequence[Request], int]] = {}  # request id -> key, ladder, rung

    def submit(self, key: Key, ladder: Sequence[Request]) -> None:
        self._attempt(key, ladder, 0)

    def step(self) -> list[Outcome[Key]]:
        """One forward of the batch; the ladders that ended in it."""
        outcomes = []
        for event in self._engine.step():
            if event.completion is None and event.error is None:
                continue
            key, ladder, rung = self._running.pop(event.request_id)
            if event.completion is None:
                outcomes.append(Outcome(key, error=event.error))
                continue
            try:
                verdict = self._judge(key, event.completion)
            except Exception as error:  # a poison prompt costs its own row only
                outcomes.append(Outcome(key, error=reason_of(error)))
                continue
            if verdict.is_correct is False and rung + 1 < len(ladder):
                self._attempt(key, ladder, rung + 1)
            else:
                outcomes.append(Outcome(key, Attempt(rung, ladder[rung], event.completion), verdict))
        return outcomes

    def _attempt(self, key: Key, ladder: Sequence[Request], rung: int) -> None:
        self._running[self._engine.submit(ladder[rung])] = (key, ladder, rung)


class Teacher:
    """A loaded teacher that turns prompts into rows; plain Python, one in each Ray actor.

    `submit` prompts at any time, and call `step` while there are rows to come: each is one forward of the batch and
    returns the rows that it completed. A prompt that cannot be decoded (longer than the context, say) gives a row
    with its `prompt_id`, `messages`, `reference`, `id` and `error`, and does not disturb its neighbours.
    """

    def __init__(self, settings: TrajectorySettings, task: Task) -> None:
        if settings.device == "cpu":
            torch.set_num_threads(1)  # one CPU an actor: more threads would fight with the other actors
        self.settings, self.task = settings, task
        self.llm = DiffusionLLM.from_pretrained(
            settings.teacher,
            decoder=teacher_decoder(settings, read_configs(settings.teacher)[1]),
            dtype=settings.dtype,
            device=settings.device,
            max_batch_size=settings.max_batch_size,
        )
        self._ladders: Ladders[Prompt] = Ladders(self.llm.engine, self._judge)
        self._refused: list[TrajectoryRow] = []

    @property
    def active(self) -> int:
        """Attempts that are being decoded."""
        return self.llm.engine.active

    @property
    def waiting(self) -> int:
        """Attempts that wait for a slot in the batch."""
        return self.llm.engine.waiting

    def submit(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if prompt.error is not None:
                self._refused.append(_error_row(prompt, prompt.error))
                continue
            try:
                self._ladders.submit(prompt, self._ladder(prompt))
            except Exception as error:  # a poison prompt costs its own row only
                self._refused.append(_error_row(prompt, reason_of(error)))

    def step(self) -> list[TrajectoryRow]:
        """One forward; the rows that are complete, none when there is nothing to decode."""
        rows, self._refused = self._refused, []
        return rows + [_row(outcome) for outcome in self._ladders.step()]

    def rows(self, prompts: Sequence[Prompt]) -> list[TrajectoryRow]:
        """Decode `prompts` and nothing else; one row for each, in their order."""
        self.submit(prompts)
        rows: dict[str, TrajectoryRow] = {}
        while len(rows) < len(prompts):
            rows.update((row["prompt_id"], row) for row in self.step())
        return [rows[prompt.prompt_id] for prompt in prompts]

    def _judge(self, prompt: Prompt, completion: Completion) -> Verdict:
        text, reference = self.llm.decode(completion.token_ids), prompt.reference
        return Verdict(self.task.extract(text), None if reference is None else self.task.is_correct(text, reference))

    def _ladder(self, prompt: Prompt) -> list[Request]:
        """The requests of every attempt; one only where there is no reference to be wrong against."""
        ids = self.llm.encode(prompt.messages)
        temperatures = self.settings.ladder if prompt.reference is not None else self.settings.ladder[:1]
        return [
            Request(
                prompt_ids=ids,
                max_tokens=self.settings.max_tokens,
                temperature=temperature,
                seed=attempt_seed(self.settings.seed, prompt.prompt_id, attempt),
            )
            for attempt, temperature in enumerate(temperatures)
        ]


def _error_row(prompt: Prompt, reason: str | None) -> TrajectoryRow:
    return {
        "row": prompt.row,
        "prompt_id": prompt.prompt_id,
        "messages": prompt.messages,
        "reference": prompt.reference,
        "error": reason,
        "id": prompt.id,
    }


def _row(outcome: Outcome[Prompt]) -> TrajectoryRow:
    prompt, attempt, verdict = outcome.key, outcome.attempt, outcome.verdict
    if attempt is None or verdict is None:
        return _error_row(prompt, outcome.error)
    request, completion = attempt.request, attempt.completion
    return {
        "row": prompt.row,
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
        "id": prompt.id,
    }
