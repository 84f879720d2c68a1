"""The engine: token ids in, events out, any mix of requests in one forward.

It knows no text and no HTTP. A step is: plan a batch, let a runner run it (one copy to the host), update. Requests join
and leave at every step, and nothing a request returns depends on its neighbours.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import replace

import numpy as np

from d3llm_ray.decoding.batch import Grouping, Span, StepBatch, grouped
from d3llm_ray.decoding.memory import MemoryPlan, PositionPool, plan_memory
from d3llm_ray.decoding.presets import Decoder
from d3llm_ray.decoding.request import ActiveRequest, Completion, Event, Request
from d3llm_ray.decoding.rules import family_rules
from d3llm_ray.decoding.runners import EagerRunner, Runner, run
from d3llm_ray.decoding.sampling import Sampling, row_keys
from d3llm_ray.decoding.static import SCRATCH, StaticRunner
from d3llm_ray.decoding.statistics import TokenStatistics
from d3llm_ray.errors import InputError, require
from d3llm_ray.models import Family, KVCache, Transformer

logger = logging.getLogger("d3llm_ray.decoding")


class Engine:
    """Continuous batching over one model.

    `vocabulary_size` is the number of ids that have a token (defaults to the LM head's rows); ids from there on
    are never predicted. At most `max_batch_size` requests decode at a time, and only as many as the KV pool of
    `kv_positions` (default: what fits in memory) has room for; the others wait in order. The pool takes memory from the
    first request on whose decoder uses it. `cuda_graphs` (default: on CUDA) runs greedy steps with a cache in static
    shapes, on CUDA as graphs. `runner` may be wrapped, to measure or to record what steps run.
    """

    def __init__(
        self,
        model: Transformer,
        family: Family,
        decoder: Decoder,
        *,
        max_batch_size: int = 32,
        vocabulary_size: int | None = None,
        kv_positions: int | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        decoder.check(family)
        require(max_batch_size >= 1, "max_batch_size", max_batch_size, "a positive whole number")
        require(kv_positions is None or kv_positions >= 1, "kv_positions", kv_positions, "a positive whole number")
        self.model, self.family, self.decoder = model, family, decoder
        self.max_batch_size = max_batch_size
        self.vocabulary_size = min(vocabulary_size or model.config.vocab_size, model.config.vocab_size)
        self.context = model.config.max_position_embeddings
        self.steps = 0  # so far; a step is one forward of every active request
        self.device = model.embed_tokens.weight.device
        mask = family.mask_token_id
        self._predictable = self.vocabulary_size - (mask is not None and mask < self.vocabulary_size)
        self._rules = family_rules(family)
        self.grouping = Grouping.on(self.device)
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: list[ActiveRequest] = []
        self._next_id = 0
        static = self.device.type == "cuda" if cuda_graphs is None else cuda_graphs
        self._memory = plan_memory(
            model, self.vocabulary_size, self.context, max_batch_size, self.grouping.most_tokens, kv_positions, static
        )
        self.pool = PositionPool(self._memory.kv_positions)
        self._cache = KVCache(
            model.config,
            self._memory.kv_positions,
            dtype=model.embed_tokens.weight.dtype,
            device=self.device,
            scratch=SCRATCH if static else 0,
        )
        self.eager = EagerRunner(model, self._cache, self.vocabulary_size, family.mask_token_id)
        self.runner: Runner = StaticRunner(self.eager) if static else self.eager
        if decoder.caching.uses_cache:
            self._allocate()

    @property
    def active(self) -> int:
        """Requests that are being decoded."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests accepted but not yet started."""
        return len(self._waiting)

    def memory_plan(self) -> MemoryPlan:
        """What the engine's memory is for."""
        return self._memory

    def check(self, request: Request) -> None:
        """Raise `InputError` for a request that this engine can never decode."""
        request.check(self.decoder, self.family, self.model.config.vocab_size, self.context)
        if (request.decoder or self.decoder).caching.uses_cache:
            length = request.positions(self.decoder, self.family, self.context)
            if length > self.pool.positions:
                raise InputError(
                    f"prompt: prompt and canvas need {length} positions of the KV pool; accepted: together at most "
                    f"{self.pool.positions} (kv_positions)"
                )

    def submit(self, request: Request) -> int:
        """Queue a request; returns its id. `InputError` when `check` refuses it."""
        self.check(request)
        request_id, self._next_id = self._next_id, self._next_id + 1
        self._waiting.append((request_id, request))
        return request_id

    def cancel(self, request_id: int) -> Completion | None:
        """Forget a request, waiting or active; its memory is free at once. Unknown ids are ignored.

        Returns what an active one had committed, with the finish reason "abort".
        """
        self._waiting = deque(item for item in self._waiting if item[0] != request_id)
        for row in [row for row in self._rows if row.request_id == request_id]:
            self._release(row)
            return Completion.of(row.canvas, row.sent, "abort") if row.canvas.forwards else None
        return None

    def step(self) -> list[Event]:
        """Run one forward for every active request; returns what changed (nothing when idle)."""
        self._admit()
        if not self._rows:
            return []
        batch = self._plan()
        statistics = run(self.runner, batch)
        return self._update(batch, statistics)

    def _admit(self) -> None:
        while self._waiting and len(self._rows) < self.max_batch_size:
            request_id, request = self._waiting[0]
            chosen, base = request.decoder or self.decoder, None
            if chosen.caching.uses_cache:
                base = self.pool.take(request.positions(self.decoder, self.family, self.context))
                if base is None:
                    assert self._rows, "a span of the KV pool was not given back"
                    return  # those that run will free theirs
                self._allocate()
            self._waiting.popleft()
            canvas = request.canvas(self.decoder, self.family, self.context)
            self._rows.append(ActiveRequest(request_id, request, chosen, canvas, base))

    def _allocate(self) -> None:
        if not self._cache.allocated:
            for line in self._memory.lines():
                logger.info(line)
            self._cache.allocate()

    def _release(self, row: ActiveRequest) -> None:
        self._rows.remove(row)
        if row.base is not None:
            self.pool.give_back(row.base, row.canvas.length)

    def _plan(self) -> StepBatch:
        """The next forward of every active request, in groups."""
        self.steps += 1
        spans: list[Span] = []
        for index, row in enumerate(self._rows):
            span = self._span(index, row)
            spans.append(span)
            if row.guidance:
                spans.append(self._twin(span, row))
        groups = list(grouped(spans, self.grouping))
        sampled = any(row.sampled for row in self._rows)
        return StepBatch(
            groups,
            self._sampling([span for group in groups for span in group if not span.twin]) if sampled else None,
            any(row.decoder.selection.needs_margins for row in self._rows),
            min(max(row.request.top_logprobs for row in self._rows), self._predictable),
        )

    def _span(self, index: int, row: ActiveRequest) -> Span:
        canvas = row.canvas
        canvas.forwards += 1
        row.opening = opening = row.repeat or row.decoder.schedule.open(canvas)
        window = row.decoder.caching.window(canvas, opening, self._rules)
        first = canvas.prompt_length - window.start - self._rules.logit_shift
        tokens = canvas.tokens[window.start : window.end]
        return Span(index, tokens, window, row.base, opening.eligible + first, row.guidance)

    def _twin(self, span: Span, row: ActiveRequest) -> Span:
        """The same window with a masked prompt, for classifier-free guidance."""
        tokens = row.canvas.tokens.copy()
        assert self.family.mask_token_id is not None  # the decoder has checked
        tokens[: row.canvas.prompt_length] = self.family.mask_token_id
        return replace(span, tokens=tokens[span.window.start : span.window.end], twin=True)

    def _sampling(self, spans: list[Span]) -> Sampling:
        rows = [self._rows[span.row] for span in spans]
        requests, counts = [row.request for row in rows], [len(span.scored) for span in spans]
        hot = any(request.temperature > 0 for request in requests)
        keys = [
            row_keys(row.request.seed, row.opening.eligible, row.canvas.forwards)
            for row in rows
            if hot and row.opening is not None
        ]
        return Sampling(
            np.repeat(np.array([request.temperature for request in requests], dtype=np.float32), counts),
            np.repeat(np.array([request.top_p for request in requests], dtype=np.float32), counts),
            np.repeat(np.array([min(one.top_k, self.vocabulary_size) for one in requests], dtype=np.int64), counts),
            np.concatenate(keys) if hot else np.zeros(sum(counts), dtype=np.uint64),
        )

    def _update(self, batch: StepBatch, statistics: TokenStatistics) -> list[Event]:
        """Reveal what the selections choose; events of the requests for which something has changed."""
        rows, events, begin = list(self._rows), [], 0
        sound = bool(statistics.finite.all())
        for span in batch.spans:
            row, end = rows[span.row], begin + len(span.scored)
            figures = statistics.rows(slice(begin, end))
            begin = end
            if sound or figures.finite.all():
                event = row.reveal(figures, self._rules, self.family.eos_token_id)
            else:
                event = row.failed()
            if event is not None:
                if event.completion is not None or event.error is not None:
                    self._release(row)
                events.append(event)
        return events
