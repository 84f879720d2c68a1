"""Names of all metrics, exported by Ray as Prometheus series `ray_<name>`, counters as `ray_<name>_total`.

Outside a Ray process the same objects record into nothing, so callers never ask where they run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ray.util.metrics import Counter, Gauge

Clock = Callable[[], float]  # seconds
_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]
_TOKENS_PER_SECOND = [1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0]
_TOKENS_PER_FORWARD = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 32.0]


class KVPool(Protocol):
    """What is read of an engine's pool: its positions, and those that no request holds."""

    positions: int

    @property
    def free(self) -> int: ...


class ServingMetrics:
    """What one decoder replica reports; every series carries the tag `model`.

    In a replica Serve adds the tags `deployment`, `replica` and `application`. Elsewhere, as in Serve's proxy, only
    `application` can be told apart, by what is given here.
    """

    def __init__(self, model: str, application: str | None = None) -> None:
        from ray.serve import metrics  # seconds to import, and other rooms need it not

        if _in_replica():  # a router is one, with a front for each model
            application = None
        of_model: Any = ("model",) if application is None else ("model", "application")  # Serve types it as one string
        self._requests = metrics.Counter("d3llm_requests", "Requests accepted into the engine's queue", of_model)
        self._refused = metrics.Counter("d3llm_refused", "Requests refused because the queue was full", of_model)
        self._finished = metrics.Counter(
            "d3llm_finished", "Accepted requests that ended, by reason", (*of_model, "reason")
        )
        self._tokens = metrics.Counter("d3llm_tokens", "Tokens of finished requests, by kind", (*of_model, "kind"))
        self._forwards = metrics.Counter("d3llm_forwards", "Model forwards, each of a whole batch", of_model)
        self._request_forwards = metrics.Counter(
            "d3llm_request_forwards", "Requests in forwards, by what of each is computed anew", (*of_model, "kind")
        )
        self._queue = metrics.Gauge("d3llm_queue", "Requests waiting for a slot", of_model)
        self._active = metrics.Gauge("d3llm_active", "Requests in the running batch", of_model)
        self._kv_used = metrics.Gauge("d3llm_kv_used", "Positions of the KV pool that requests hold", of_model)
        self._kv_positions = metrics.Gauge("d3llm_kv_positions", "Positions of the KV pool", of_model)
        self._first = metrics.Histogram("d3llm_ttfb_seconds", "Arrival to the first committed span", _SECONDS, of_model)
        self._seconds = metrics.Histogram("d3llm_request_seconds", "Arrival to the answer's end", _SECONDS, of_model)
        self._speed = metrics.Histogram(
            "d3llm_tokens_per_second", "Tokens a second of an answer, from its arrival on", _TOKENS_PER_SECOND, of_model
        )
        self._tpf = metrics.Histogram("d3llm_tpf", "Tokens per forward of a request", _TOKENS_PER_FORWARD, of_model)
        self._model = {"model": model} if application is None else {"model": model, "application": application}

    def accepted(self) -> None:
        self._requests.inc(tags=self._model)

    def refused(self) -> None:
        self._refused.inc(tags=self._model)

    def stepped(self, active: int, waiting: int, pool: KVPool) -> None:
        """Record one batched forward and what the engine holds after it."""
        self._forwards.inc(tags=self._model)
        self.occupancy(active, waiting, pool)

    def occupancy(self, active: int, waiting: int, pool: KVPool) -> None:
        self._active.set(active, tags=self._model)
        self._queue.set(waiting, tags=self._model)
        self._kv_used.set(pool.positions - pool.free, tags=self._model)
        self._kv_positions.set(pool.positions, tags=self._model)

    def computed(self, full: int, cached: int) -> None:
        """Record the requests in a forward: those computed from their first position on, and those behind a cache."""
        for kind, count in (("full", full), ("cached", cached)):
            if count:  # Ray refuses to add 0 to a counter
                self._request_forwards.inc(count, tags={**self._model, "kind": kind})

    def first_text(self, seconds: float) -> None:
        self._first.observe(seconds, tags=self._model)

    def aborted(self) -> None:
        """Record a request whose client left."""
        self._ended("abort")

    def timed_out(self) -> None:
        """Record a request that missed its deadline."""
        self._ended("timeout")

    def failed(self) -> None:
        """Record a request that the engine could not answer."""
        self._ended("error")

    def finished(self, reason: str, prompt_tokens: int, completion_tokens: int, forwards: int, seconds: float) -> None:
        """Record an answer; `reason` is its finish reason, `seconds` the time since the request's arrival."""
        self._ended(reason)
        for kind, count in (("prompt", prompt_tokens), ("completion", completion_tokens)):
            if count:
                self._tokens.inc(count, tags={**self._model, "kind": kind})
        self._seconds.observe(seconds, tags=self._model)
        if forwards:
            self._tpf.observe(completion_tokens / forwards, tags=self._model)
            self._speed.observe(completion_tokens / seconds, tags=self._model)

    def _ended(self, reason: str) -> None:
        self._finished.inc(tags={**self._model, "reason": reason})


def _in_replica() -> bool:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        serve.get_replica_context()
    except RayServeException:
        return False
    return True


class TeacherMetrics:
    """What one teacher actor reports; every series carries the tag `teacher`."""

    def __init__(self, teacher: str, clock: Clock = time.monotonic) -> None:
        of_teacher = ("teacher",)
        self._rows = Counter(
            "d3llm_teacher_rows", "Finished rows, by result and 0-based attempt", ("teacher", "result", "attempt")
        )
        self._tokens = Counter(
            "d3llm_teacher_tokens",
            "Canvas positions of finished rows, those behind the stop token included",
            of_teacher,
        )
        self._row_forwards = Counter("d3llm_teacher_row_forwards", "Forwards that finished rows were in", of_teacher)
        self._forwards = Counter("d3llm_teacher_forwards", "Model forwards, each of a whole batch", of_teacher)
        self._retries = Counter("d3llm_teacher_retries", "Wrong answers of finished rows decoded anew", of_teacher)
        self._errors = Counter("d3llm_teacher_errors", "Prompts that could not be decoded", of_teacher)
        self._queue = Gauge("d3llm_teacher_queue", "Prompts waiting for a slot", of_teacher)
        self._active = Gauge("d3llm_teacher_active", "Rows in the running batch", of_teacher)
        self._rows_per_second = Gauge(
            "d3llm_teacher_rows_per_second", "Finished rows a second, over half a minute", of_teacher
        )
        self._tokens_per_second = Gauge(
            "d3llm_teacher_tokens_per_second", "These positions a second, over half a minute", of_teacher
        )
        self._row_rate, self._token_rate = Rate(clock=clock), Rate(clock=clock)
        self._teacher = {"teacher": teacher}

    def stepped(self, active: int, waiting: int) -> None:
        """Record one batched forward and what the engine holds after it."""
        self._forwards.inc(tags=self._teacher)
        self._active.set(active, tags=self._teacher)
        self._queue.set(waiting, tags=self._teacher)
        self._rows_per_second.set(self._row_rate.per_second(), tags=self._teacher)
        self._tokens_per_second.set(self._token_rate.per_second(), tags=self._teacher)

    def finished(self, is_correct: bool | None, tokens: int, forwards: int, attempt: int) -> None:
        """Record a row. `is_correct`: None without a reference; `attempt`: 0-based, so also the retries it took."""
        result = {True: "correct", False: "wrong", None: "unjudged"}[is_correct]
        self._rows.inc(tags={**self._teacher, "result": result, "attempt": str(attempt)})
        for counter, count in ((self._tokens, tokens), (self._row_forwards, forwards), (self._retries, attempt)):
            if count:  # Ray refuses to add 0 to a counter
                counter.inc(count, tags=self._teacher)
        self._row_rate.add(1)
        self._token_rate.add(tokens)

    def failed(self) -> None:
        self._errors.inc(tags=self._teacher)


_DISTILL_RATES = {
    "samples_per_second": "Trained rows a second, all workers",
    "tokens_per_second": "Forwarded tokens a second, all workers",
    "steps_per_second": "Optimizer steps a second",
}
_DISTILL_GAUGES = {
    **_DISTILL_RATES,
    "step": "Optimizer steps that the student has behind it",
    "epoch": "Epoch, 0-based",
    "window": "Scheduled tokens in a training window",
    "noise_floor": "Scheduled smallest mask ratio",
    "mask_ratio": "Measured mask ratio",
    "lr": "Learning rate",
    "loss": "Training loss, mean over the workers",
    "grad_norm": "Gradient norm before clipping",
    "memory_gib": "Peak memory of the first worker in GiB: its GPU's, or its process's",
    "val_loss": "Loss on the rows held out",
    "val_accuracy": "Percent of the validation problems that the student solves",
    "val_errors": "Validation problems without an answer, which count as wrong",
    "val_tpf": "Tokens per forward on the validation problems",
}


class DistillMetrics:
    """What the first worker of a distillation reports; every series carries the tag `student`.

    The student has `done` optimizer steps behind it already.
    """

    def __init__(self, student: str, done: int = 0) -> None:
        self._steps = Counter(
            "d3llm_distill_steps", "Optimizer steps, those repeated after a failure included", ("student",)
        )
        self._gauges = {
            name: Gauge(f"d3llm_distill_{name}", text, ("student",)) for name, text in _DISTILL_GAUGES.items()
        }
        self._figure = Gauge(
            "d3llm_distill_figure", "What the objective reports beside the loss, by name", ("student", "figure")
        )
        self._done = done
        self._student = {"student": student}

    def log(self, line: Mapping[str, float | int | str]) -> None:
        """Record the figures of a step by their names, `step` (1-based) among them; texts are passed over."""
        step = int(line["step"])
        self._steps.inc(step - self._done, tags=self._student)
        self._done = step
        for name, value in line.items():
            if isinstance(value, str):
                continue
            if name in self._gauges:
                self._gauges[name].set(value, tags=self._student)
            else:
                self._figure.set(value, tags={**self._student, "figure": name})

    def close(self) -> None:
        """Let the rates fall to 0: Ray exports the last values for as long as the process lives."""
        for name in _DISTILL_RATES:
            self._gauges[name].set(0.0, tags=self._student)


class Rate:
    """Events a second over the last `window_s` seconds, or since this was made while that is less."""

    def __init__(self, window_s: float = 30.0, clock: Clock = time.monotonic) -> None:
        self._window_s, self._clock = window_s, clock
        self._began = clock()
        self._events: deque[tuple[float, int]] = deque()  # (seconds, count)
        self._sum = 0

    def add(self, count: int) -> None:
        self._events.append((self._clock(), count))
        self._sum += count

    def per_second(self) -> float:
        now = self._clock()
        while self._events and self._events[0][0] <= now - self._window_s:
            self._sum -= self._events.popleft()[1]
        elapsed = min(self._window_s, now - self._began)
        return self._sum / elapsed if elapsed > 0 else 0.0
