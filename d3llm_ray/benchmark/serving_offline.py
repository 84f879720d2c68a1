"""The engine that a server has inside, without the server: the same requests, in this process, as many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

from d3llm_ray.benchmark.exchange import ANSWERED, Answered, Exchange, Passage, Revelation
from d3llm_ray.benchmark.serving_load import Bounds
from d3llm_ray.decoding import Completion, DiffusionLLM, Request
from d3llm_ray.errors import DecodingError
from d3llm_ray.serving.settings import ReplicaSettings


class OfflineEngine:
    """Decodes a benchmark's prompts as a replica with these settings would, `cpus_per_actor` threads included."""

    def __init__(self, settings: ReplicaSettings, prompts: Sequence[Any]) -> None:
        self._threads = max(settings.cpus_per_actor, 1)
        self._llm = DiffusionLLM.from_pretrained(
            settings.model, settings.decoding(), settings.dtype, settings.device, settings.max_batch_size
        )
        self._requests = [Request(self._llm.encode(messages), settings.max_tokens) for messages in prompts]
        for request in self._requests:
            self._llm.engine.check(request)
        self._answers: dict[int, Answered] = {}

    def run(self, clients: int, bounds: Bounds) -> Passage:
        """A closed load without HTTP: `clients` requests in the engine at a time."""
        with _threads(self._threads):
            began = perf_counter()
            completed = list(self._decode(clients, bounds))
            seconds = perf_counter() - began
        exchanges = [
            Exchange(prompt, sent, end, ANSWERED, first, self._answered(prompt, completion))
            for prompt, sent, first, end, completion in completed
        ]
        return Passage(tuple(exchanges), seconds)

    def answer(self, prompt: int) -> Answered:
        """What the engine answers to a prompt, reveals included."""
        if prompt not in self._answers:
            with _threads(self._threads):
                ((_, _, _, _, completion),) = self._decode(1, Bounds(1, float("inf")), prompt)
            self._answered(prompt, completion)
        return self._answers[prompt]

    def _decode(
        self, clients: int, bounds: Bounds, start: int = 0
    ) -> Iterator[tuple[int, float, float | None, float, Completion]]:
        """(prompt, sent, first tokens, end, completion) of each request, as they end."""
        engine, began = self._llm.engine, perf_counter()
        pending = iter(range(start, start + bounds.requests))
        asked: dict[int, tuple[int, float]] = {}
        first: dict[int, float] = {}
        while True:
            while len(asked) < clients and perf_counter() - began < bounds.seconds:
                number = next(pending, None)
                if number is None:
                    break
                prompt = number % len(self._requests)
                asked[engine.submit(self._requests[prompt])] = (prompt, perf_counter())
            if not asked:
                return
            events, now = engine.step(), perf_counter()
            for event in events:
                if event.error is not None:
                    raise DecodingError(event.error)
                if event.token_ids:
                    first.setdefault(event.request_id, now)
                if event.completion is not None:
                    prompt, sent = asked.pop(event.request_id)
                    yield prompt, sent, first.get(event.request_id), now, event.completion

    def _answered(self, prompt: int, completion: Completion) -> Answered:
        """Read outside the measured time: a server's engine thread does not read its answers either."""
        if prompt not in self._answers:
            self._answers[prompt] = Answered(
                self._llm.decode(completion.token_ids),
                completion.finish_reason,
                len(self._requests[prompt].prompt_ids),
                len(completion.token_ids),
                completion.forwards,
                self._revealed(completion),
            )
        return self._answers[prompt]

    def _revealed(self, completion: Completion) -> Revelation:
        assert self._llm.tokenizer is not None  # a server has refused a model without one
        steps = enumerate(completion.reveal_steps)
        return {
            position: (step, str(self._llm.tokenizer.decode([completion.response_ids[position]])))
            for position, step in steps
            if step >= 0
        }


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Ray gives a replica as many threads as CPUs: more of them here would be another machine."""
    usual = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(usual)
