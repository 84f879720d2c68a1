"""The engine: token ids in, events out, any mix of requests in one forward.

It knows no text and no HTTP. A step is: plan every row's window, one batched forward, statistics on the scored
rows with one copy to the host, selection, update. Requests join and leave at every step, and nothing a request
returns depends on its neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from d3llm_ray.decoding.caches import Window
from d3llm_ray.decoding.canvas import Canvas, IntArray
from d3llm_ray.decoding.presets import Decoder
from d3llm_ray.decoding.rules import family_rules
from d3llm_ray.decoding.statistics import TokenStatistics, row_keys, token_statistics
from d3llm_ray.errors import InputError, require
from d3llm_ray.models import Family, KVCache, Ragged, Transformer

CAPACITY_STEP = 64  # cache positions are added in multiples of this


@dataclass(frozen=True)
class Request:
    """One prompt to decode.

    `max_tokens` is what the answer may have at most; the canvas is that rounded up to whole blocks. `decoder`
    None takes the engine's own.
    """

    prompt_ids: Sequence[int]
    max_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    decoder: Decoder | None = None


@dataclass(frozen=True)
class Completion:
    """A finished request. Lists over the canvas have one entry for each response position."""

    token_ids: list[int]  # the answer: before the stop token, at most max_tokens
    finish_reason: str  # "stop" or "length"
    forwards: int  # model forwards in which the request took part, full and refresh ones included
    response_ids: list[int]  # the whole canvas, stop token and padding included
    reveal_steps: list[int]  # 0-based forward that revealed each position
    reveal_entropies: list[float]  # nats, at the reveal


@dataclass(frozen=True)
class Event:
    """What a step changed for one request: newly committed answer tokens, and the completion at the end."""

    request_id: int
    token_ids: list[int]
    completion: Completion | None = None


@dataclass
class _Row:
    """A request that holds a slot."""

    request_id: int
    request: Request
    decoder: Decoder
    canvas: Canvas
    slot: int
    sent: int = 0  # answer tokens reported so far
    eligible: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class Engine:
    """Continuous batching over one model.

    `vocabulary_size` is the number of ids that have a token (defaults to the LM head's rows); ids from there on
    are never predicted. At most `max_batch_size` requests decode at a time; the others wait in order.
    """

    def __init__(
        self,
        model: Transformer,
        family: Family,
        decoder: Decoder,
        *,
        max_batch_size: int = 32,
        vocabulary_size: int | None = None,
    ) -> None:
        if family.mask_token_id is None:
            raise InputError(
                f"decoder: {decoder.name!r} cannot decode a {family.name!r} model: it is causal and has no mask token; "
                "accepted: a masked-diffusion model (llada, dream)"
            )
        require(max_batch_size >= 1, "max_batch_size", max_batch_size, "a positive whole number")
        self.model, self.family, self.decoder = model, family, decoder
        self.max_batch_size = max_batch_size
        self.vocabulary_size = min(vocabulary_size or model.config.vocab_size, model.config.vocab_size)
        self.context = model.config.max_position_embeddings
        self.forwards = 0  # model forwards run so far
        self._mask_id = family.mask_token_id
        self._rules = family_rules(family)
        self._device = model.embed_tokens.weight.device
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: list[_Row] = []
        self._free_slots = list(range(max_batch_size - 1, -1, -1))
        self._next_id = 0
        self._cache: KVCache | None = None

    @property
    def active(self) -> int:
        """Requests that hold a slot."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests accepted but not yet started."""
        return len(self._waiting)

    def check(self, request: Request) -> None:
        """Raise `InputError` for a request that this engine can never decode."""
        require(request.max_tokens >= 1, "max_tokens", request.max_tokens, "a positive whole number")
        hot = 0.0 <= request.temperature < float("inf")
        require(hot, "temperature", request.temperature, "a number, 0 or more")
        length = len(request.prompt_ids)
        require(length >= 1, "prompt", "no tokens", "one token or more")
        room = self.context - length
        if room < request.max_tokens:
            raise InputError(
                f"prompt: {length} tokens and max_tokens {request.max_tokens} exceed the model's context of "
                f"{self.context}; accepted: together at most {self.context}"
            )
        ids = np.asarray(request.prompt_ids)
        valid = ids.dtype.kind in "iu" and int(ids.min()) >= 0 and int(ids.max()) < self.model.config.vocab_size
        require(valid, "prompt", "a token id out of range", f"ids from 0 to {self.model.config.vocab_size - 1}")

    def submit(self, request: Request) -> int:
        """Queue a request; returns its id. `InputError` when `check` refuses it."""
        self.check(request)
        request_id, self._next_id = self._next_id, self._next_id + 1
        self._waiting.append((request_id, request))
        return request_id

    def cancel(self, request_id: int) -> None:
        """Forget a request, waiting or active; its slot is free at once. Unknown ids are ignored."""
        self._waiting = deque(item for item in self._waiting if item[0] != request_id)
        for row in [row for row in self._rows if row.request_id == request_id]:
            self._release(row)

    def step(self) -> list[Event]:
        """Run one forward for every active request; returns what changed (nothing when idle)."""
        self._admit()
        if not self._rows:
            return []
        windows = [self._plan(row) for row in self._rows]
        statistics = self._forward(windows)
        self.forwards += 1
        events, begin = [], 0
        for row in list(self._rows):
            rows = slice(begin, begin + len(row.eligible))
            begin = rows.stop
            self._update(row, statistics, rows)
            event = self._event(row)
            if event is not None:
                events.append(event)
        return events

    def _admit(self) -> None:
        while self._waiting and self._free_slots:
            request_id, request = self._waiting.popleft()
            chosen = request.decoder or self.decoder
            block = chosen.block_size or self.family.block_size
            rounded = -(-request.max_tokens // block) * block
            # A context too short for whole blocks shortens the last one instead of refusing the request.
            size = min(rounded, self.context - len(request.prompt_ids))
            canvas = Canvas(request.prompt_ids, size, block, self._mask_id)
            self._rows.append(_Row(request_id, request, chosen, canvas, self._free_slots.pop()))

    def _release(self, row: _Row) -> None:
        self._rows.remove(row)
        self._free_slots.append(row.slot)

    def _plan(self, row: _Row) -> Window:
        canvas = row.canvas
        canvas.forwards += 1
        row.eligible, active_end = row.decoder.schedule.open(canvas)
        window = row.decoder.caching.window(canvas, active_end, self._rules)
        if self.family.logit_shift and window.start > 0:
            # The row that predicts the window's first token is the one before it: computed with it every time.
            return Window(window.start - 1, window.end, window.key_length)
        return window

    def _forward(self, windows: list[Window]) -> TokenStatistics:
        """One batched forward; statistics of every row's eligible positions, row after row."""
        rows = self._rows
        tokens = [row.canvas.tokens[w.start : w.end] for row, w in zip(rows, windows, strict=True)]
        ragged = Ragged.build(
            [w.end - w.start for w in windows],
            [w.start for w in windows],
            [w.key_length for w in windows],
            device=self._device,
        )
        first = np.cumsum([0] + [len(window) for window in tokens[:-1]])
        shift = 1 if self.family.logit_shift else 0
        scored = np.concatenate(
            [
                begin + row.canvas.prompt_length + row.eligible - window.start - shift
                for row, window, begin in zip(rows, windows, first, strict=True)
            ]
        )
        counts = [len(row.eligible) for row in rows]
        temperatures = np.repeat(np.array([row.request.temperature for row in rows], dtype=np.float32), counts)
        keys = np.concatenate([row_keys(row.request.seed, row.eligible, row.canvas.forwards) for row in rows])
        with torch.inference_mode():
            hidden = self.model(self._put(np.concatenate(tokens)), ragged, self._select_cache(windows))
            chosen = hidden[self._put(scored)]
            return token_statistics(self.model, chosen, self.vocabulary_size, self._mask_id, temperatures, keys)

    def _select_cache(self, windows: list[Window]) -> KVCache | None:
        if not any(row.decoder.caching.uses_cache for row in self._rows):
            return None
        needed = max(row.canvas.length for row in self._rows)
        if self._cache is None or self._cache.capacity < needed:
            capacity = min(-(-needed // CAPACITY_STEP) * CAPACITY_STEP, self.context)
            dtype = self.model.embed_tokens.weight.dtype
            grown = KVCache(self.model.config, self.max_batch_size, capacity, dtype=dtype, device=self._device)
            if self._cache is not None:
                grown.copy_from(self._cache)
            self._cache = grown
        self._cache.select(self._put(np.array([row.slot for row in self._rows], dtype=np.int64)))
        return self._cache

    def _put(self, array: IntArray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _update(self, row: _Row, statistics: TokenStatistics, rows: slice) -> None:
        entropy, confidence = statistics.entropy[rows], statistics.confidence[rows]
        revealed, forced = row.decoder.selection.select(row.canvas, row.eligible, entropy, confidence, self._rules)
        tokens = np.where(forced, statistics.argmax[rows], statistics.sampled[rows])
        row.canvas.commit(row.eligible[revealed], tokens[revealed], entropy[revealed])
        if row.decoder.early_stop:
            row.canvas.fill_after_stop(self.family.stop_token_ids, self.family.eos_token_id)

    def _event(self, row: _Row) -> Event | None:
        """Report newly committed answer tokens; finish the request when nothing it may return is masked."""
        canvas, limit = row.canvas, row.request.max_tokens
        answer = canvas.tokens[canvas.prompt_length : canvas.prompt_length + min(canvas.committed, limit)]
        stops = np.flatnonzero(np.isin(answer, self.family.stop_token_ids))
        if stops.size:
            answer = answer[: stops[0]]
        new = answer[row.sent :].tolist()
        row.sent = max(row.sent, len(answer))
        if canvas.masked[:limit].any():
            return Event(row.request_id, new) if new else None
        self._release(row)
        completion = Completion(
            token_ids=answer.tolist(),
            finish_reason="stop" if stops.size else "length",
            forwards=canvas.forwards,
            response_ids=canvas.tokens[canvas.prompt_length :].tolist(),
            reveal_steps=canvas.reveal_step.tolist(),
            reveal_entropies=canvas.reveal_entropy.tolist(),
        )
        return Event(row.request_id, new, completion)
