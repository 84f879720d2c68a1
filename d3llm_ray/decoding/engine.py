"""The engine: token ids in, events out, any mix of requests in one forward.

It knows no text and no HTTP. A step is: plan every row's window, one batched forward, statistics on the scored
rows with one copy to the host, selection, update. Requests join and leave at every step, and nothing a request
returns depends on its neighbours.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d3llm_ray.decoding.batch import Group, Span, groups, guided_rows, max_group_tokens
from d3llm_ray.decoding.caches import Window
from d3llm_ray.decoding.canvas import Canvas
from d3llm_ray.decoding.memory import MemoryPlan, PositionPool, plan_memory
from d3llm_ray.decoding.presets import Decoder
from d3llm_ray.decoding.profile import StepProfile
from d3llm_ray.decoding.request import Completion, Event, Request, Reveal
from d3llm_ray.decoding.rules import family_rules
from d3llm_ray.decoding.sampling import Sampling, row_keys
from d3llm_ray.decoding.schedules import Opening
from d3llm_ray.decoding.static import SCRATCH, StaticRunner
from d3llm_ray.decoding.statistics import TokenStatistics, token_statistics, unpack
from d3llm_ray.errors import InputError, require
from d3llm_ray.models import Family, KVCache, Transformer

logger = logging.getLogger("d3llm_ray.decoding")


@dataclass
class _Row:
    """A request that is being decoded."""

    request_id: int
    request: Request
    decoder: Decoder
    canvas: Canvas
    base: int | None  # place of its canvas in the KV pool, where its decoder uses one
    sent: int = 0  # answer tokens reported so far
    opening: Opening | None = None

    @property
    def guidance(self) -> float:
        return float(getattr(self.decoder.selection, "cfg_scale", 0.0))


class Engine:
    """Continuous batching over one model.

    `vocabulary_size` is the number of ids that have a token (defaults to the LM head's rows); ids from there on
    are never predicted. At most `max_batch_size` requests decode at a time, and only as many as the KV pool of
    `kv_positions` (default: what fits in memory) has room for; the others wait in order. `cuda_graphs` (default: on
    CUDA) runs greedy steps with a cache in static shapes, on CUDA as graphs.
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
        self.profile = StepProfile()
        self.capture: list[tuple[Tensor, Any, KVCache | None, Tensor]] | None = None  # of forwards, for replay
        self._rules = family_rules(family)
        self._device = model.embed_tokens.weight.device
        self._max_tokens = max_group_tokens(self._device)
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: list[_Row] = []
        self._next_id = 0
        self._static = self._device.type == "cuda" if cuda_graphs is None else cuda_graphs
        self._runner: StaticRunner | None = None
        self._plan_of_memory = plan_memory(
            model, self.vocabulary_size, self.context, max_batch_size, self._max_tokens, kv_positions, self._static
        )
        self._pool = PositionPool(self._plan_of_memory.kv_positions)
        self._cache = self._allocate() if decoder.caching.uses_cache else None

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
        return self._plan_of_memory

    def check(self, request: Request) -> None:
        """Raise `InputError` for a request that this engine can never decode."""
        request.check(self.decoder, self.family, self.model.config.vocab_size, self.context)
        if (request.decoder or self.decoder).caching.uses_cache:
            length = request.positions(self.decoder, self.family, self.context)
            if length > self._pool.positions:
                raise InputError(
                    f"prompt: prompt and canvas need {length} positions of the KV pool; accepted: together at most "
                    f"{self._pool.positions} (kv_positions)"
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
        self.steps += 1
        profile = self.profile
        with profile.time("plan"):
            spans = [span for index, row in enumerate(self._rows) for span in self._plan(index, row)]
            parts = list(groups(spans, self._device, self._max_tokens))
            ordered = [span for part in parts for span in part]
            sampling = self._sampling([span for span in ordered if not span.twin])
            runner = self._runner if self.capture is None and not sampling.active.any() else None
            static = runner if runner is not None and runner.accepts(parts) else None
            batch = [] if static is not None else [Group.build(part, self._device) for part in parts]
            profile.count(parts)
        with torch.inference_mode():
            with profile.time("forward"):
                if static is not None:
                    packed = static.run(parts)  # statistics included
                else:
                    hidden = torch.cat([self._forward(group) for group in batch])
            with profile.time("statistics"):
                statistics = unpack(packed) if static is not None else self._score(hidden, ordered, sampling)
        with profile.time("update"):
            return self._update_all([span for span in ordered if not span.twin], statistics)

    def _admit(self) -> None:
        while self._waiting and len(self._rows) < self.max_batch_size:
            request_id, request = self._waiting[0]
            chosen, base = request.decoder or self.decoder, None
            if chosen.caching.uses_cache:
                base = self._pool.take(request.positions(self.decoder, self.family, self.context))
                if base is None:
                    assert self._rows, "a span of the KV pool was not given back"
                    return  # those that run will free theirs
                self._cache = self._cache or self._allocate()
            self._waiting.popleft()
            canvas = request.canvas(self.decoder, self.family, self.context)
            self._rows.append(_Row(request_id, request, chosen, canvas, base))

    def _allocate(self) -> KVCache:
        for line in self._plan_of_memory.lines():
            logger.info(line)
        dtype, scratch = self.model.embed_tokens.weight.dtype, SCRATCH if self._static else 0
        cache = KVCache(self.model.config, self._pool.positions, dtype=dtype, device=self._device, scratch=scratch)
        if self._static:
            self._runner = StaticRunner(self.model, cache, self.vocabulary_size, self.family.mask_token_id)
        return cache

    def _release(self, row: _Row) -> None:
        self._rows.remove(row)
        if row.base is not None:
            self._pool.give_back(row.base, row.canvas.length)

    def _plan(self, index: int, row: _Row) -> list[Span]:
        """The sequences that a request has in the next forward."""
        canvas = row.canvas
        canvas.forwards += 1
        row.opening = row.decoder.schedule.open(canvas)
        window: Window = row.decoder.caching.window(canvas, row.opening, self._rules)
        first = canvas.prompt_length - window.start - self._rules.logit_shift
        span = Span(index, canvas.tokens[window.start : window.end], window, row.base, row.opening.eligible + first)
        if row.guidance == 0.0:
            return [span]
        tokens = canvas.tokens.copy()
        assert self.family.mask_token_id is not None  # the decoder has checked
        tokens[: canvas.prompt_length] = self.family.mask_token_id
        return [span, replace(span, tokens=tokens[window.start : window.end], twin=True)]

    def _sampling(self, spans: list[Span]) -> Sampling:
        requests = [self._rows[span.row].request for span in spans]
        counts = [len(span.scored) for span in spans]
        hot = any(request.temperature > 0 for request in requests)
        keys = [
            row_keys(row.request.seed, row.opening.eligible, row.canvas.forwards)
            for row in (self._rows[span.row] for span in spans)
            if hot and row.opening is not None
        ]
        return Sampling(
            np.repeat(np.array([request.temperature for request in requests], dtype=np.float32), counts),
            np.repeat(np.array([request.top_p for request in requests], dtype=np.float32), counts),
            np.repeat(np.array([request.top_k for request in requests], dtype=np.int64), counts),
            np.concatenate(keys) if hot else np.zeros(sum(counts), dtype=np.uint64),
        )

    def _forward(self, group: Group) -> Tensor:
        """One model call: hidden states of the group's scored rows, [N, hidden_size]."""
        cache = self._cache if group.sequences[0].base is not None else None
        if self.capture is not None:
            self.capture.append((group.token_ids, group.ragged, cache, group.scored))
        out: Tensor = self.model(group.token_ids, group.ragged, cache, group.scored)
        return out

    def _score(self, hidden: Tensor, ordered: list[Span], sampling: Sampling) -> TokenStatistics:
        options: dict[str, Any] = {
            "vocabulary": self.vocabulary_size,
            "mask_id": self.family.mask_token_id,
            "sampling": sampling,
            "margins": any(row.decoder.selection.needs_margins for row in self._rows),
        }
        if not any(span.twin for span in ordered):
            return token_statistics(self.model, hidden, **options)
        conditional, twins, of_request = guided_rows(ordered)
        scales = np.array([row.guidance for row in self._rows], dtype=np.float32)[of_request]
        return token_statistics(self.model, hidden[conditional], guidance=(hidden[twins], scales), **options)

    def _update_all(self, spans: list[Span], statistics: TokenStatistics) -> list[Event]:
        rows, events, begin = list(self._rows), [], 0
        for span in spans:
            end = begin + len(span.scored)
            event = self._update(rows[span.row], statistics.rows(begin, end))
            begin = end
            if event is not None:
                events.append(event)
        return events

    def _update(self, row: _Row, statistics: TokenStatistics) -> Event | None:
        canvas, opening = row.canvas, row.opening
        assert opening is not None
        if not statistics.finite.all():
            self._release(row)
            error = f"request {row.request_id}: the model's logits are NaN or infinite in forward {canvas.forwards}"
            return Event(row.request_id, [], canvas.forwards, error=error)
        revealed, forced = row.decoder.selection.select(canvas, opening, statistics, self._rules, row.request.seed)
        tokens = np.where(forced, statistics.argmax, statistics.sampled)[revealed]
        positions, entropies = opening.eligible[revealed], statistics.entropy[revealed]
        canvas.commit(positions, tokens, entropies, statistics.logprob[revealed])
        if row.decoder.early_stop:
            canvas.fill_after_stop(self.family.eos_token_id)
        reveal = None
        if row.request.reveals:
            reveal = Reveal(canvas.forwards - 1, positions.tolist(), tokens.tolist(), entropies.tolist())
        return self._event(row, reveal)

    def _finished(self, row: _Row) -> bool:
        """Nothing that may be returned is masked; a growing canvas also ends with its stop token's blocks."""
        canvas = row.canvas
        if not canvas.masked[: row.request.max_tokens].any():
            return True
        stopped = row.decoder.schedule.growing and canvas.stop is not None
        return stopped and not canvas.masked[: canvas.created_end].any()

    def _event(self, row: _Row, reveal: Reveal | None) -> Event | None:
        """Report newly committed answer tokens; finish the request when it is complete."""
        canvas = row.canvas
        end = min(canvas.committed, row.request.max_tokens)
        stopped = canvas.stop is not None and canvas.stop < end
        if canvas.stop is not None:
            end = min(end, canvas.stop)
        new: list[int] = canvas.response[row.sent : end].tolist()
        row.sent = max(row.sent, end)
        if not self._finished(row):
            return Event(row.request_id, new, canvas.forwards, None, reveal) if new or reveal else None
        self._release(row)
        canvas.fill(self.family.eos_token_id)
        completion = Completion.of(canvas, end, "stop" if stopped else "length")
        return Event(row.request_id, new, canvas.forwards, completion, reveal)
