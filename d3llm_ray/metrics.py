"""Names of all metrics, exported by Ray as Prometheus series `ray_<name>`.

Outside a Ray process the same objects record into nothing, so callers never ask where they run.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]
_TOKENS_PER_FORWARD = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 32.0]


class ServingMetrics:
    """What one decoder replica reports; every series carries the tag `model`."""

    def __init__(self, model: str) -> None:
        self._requests = Counter("d3llm_requests", "Chat requests accepted into the engine's queue", ("model",))
        self._refused = Counter("d3llm_refused", "Chat requests refused because the queue was full", ("model",))
        self._finished = Counter("d3llm_finished", "Chat requests ended, by finish reason", ("model", "reason"))
        self._tokens = Counter("d3llm_tokens", "Tokens of finished requests, by kind", ("model", "kind"))
        self._forwards = Counter("d3llm_forwards", "Model forwards, each of a whole batch", ("model",))
        self._queue = Gauge("d3llm_queue", "Requests waiting for a slot", ("model",))
        self._active = Gauge("d3llm_active", "Requests in the running batch", ("model",))
        self._first = Histogram("d3llm_ttfb_seconds", "Arrival to the first committed span", _SECONDS, ("model",))
        self._tpf = Histogram("d3llm_tpf", "Tokens per forward of a request", _TOKENS_PER_FORWARD, ("model",))
        self._model = {"model": model}

    def accepted(self) -> None:
        self._requests.inc(tags=self._model)

    def refused(self) -> None:
        self._refused.inc(tags=self._model)

    def stepped(self, active: int, waiting: int) -> None:
        """Record one batched forward and what the engine holds after it."""
        self._forwards.inc(tags=self._model)
        self.occupancy(active, waiting)

    def occupancy(self, active: int, waiting: int) -> None:
        self._active.set(active, tags=self._model)
        self._queue.set(waiting, tags=self._model)

    def first_text(self, seconds: float) -> None:
        self._first.observe(seconds, tags=self._model)

    def aborted(self) -> None:
        """Record a request that ended without an answer: its client left, or the engine failed."""
        self._finished.inc(tags={**self._model, "reason": "abort"})

    def finished(self, reason: str, prompt_tokens: int, completion_tokens: int, forwards: int) -> None:
        self._finished.inc(tags={**self._model, "reason": reason})
        for kind, count in (("prompt", prompt_tokens), ("completion", completion_tokens)):
            if count:  # Ray refuses to add 0 to a counter
                self._tokens.inc(count, tags={**self._model, "kind": kind})
        if forwards:
            self._tpf.observe(completion_tokens / forwards, tags=self._model)
