"""What goes into the engine and what comes out: requests, events, completions. Token ids only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from d3llm_ray.decoding.canvas import Canvas
from d3llm_ray.decoding.contracts import Opening
from d3llm_ray.decoding.presets import Decoder
from d3llm_ray.decoding.rules import FamilyRules
from d3llm_ray.decoding.statistics import TokenStatistics
from d3llm_ray.errors import InputError, require
from d3llm_ray.models import Family

MOST_TOPS = 20  # tokens besides the revealed one whose log probabilities a request may ask for


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


@dataclass(frozen=True)
class Request:
    """One prompt to decode.

    `max_tokens` is what the answer may have at most; the canvas is that rounded up to whole blocks. `decoder` None
    takes the engine's own. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 filter nothing. `seed` alone decides
    what is drawn, never the batch. `stop_token_ids` end the answer besides the model's own; with `ignore_eos` those
    do not. With `reveals`, every forward of the request has an event that tells what it revealed, `top_logprobs` of the
    most probable tokens included, or all where the vocabulary has fewer.
    """

    prompt_ids: Sequence[int]
    max_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    decoder: Decoder | None = None
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    reveals: bool = False
    top_logprobs: int = 0

    def check(self, decoder: Decoder, family: Family, vocab_size: int, context: int) -> None:
        """Raise `InputError` naming the field of a request that can never be decoded with these."""
        (self.decoder or decoder).check(family)
        require(
            _whole(self.max_tokens) and self.max_tokens >= 1, "max_tokens", self.max_tokens, "a positive whole number"
        )
        hot = _number(self.temperature) and 0.0 <= self.temperature < math.inf
        require(hot, "temperature", self.temperature, "a number, 0 or more")
        require(_number(self.top_p) and 0.0 < self.top_p <= 1.0, "top_p", self.top_p, "a number above 0, at most 1")
        require(_whole(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "a whole number, 0 (off) or more")
        require(_whole(self.seed), "seed", self.seed, "a whole number")
        for token in self.stop_token_ids:
            valid = isinstance(token, int | np.integer) and 0 <= token < vocab_size
            require(valid, "stop_token_ids", token, f"ids from 0 to {vocab_size - 1}")
        asked = _whole(self.top_logprobs) and 0 <= self.top_logprobs <= MOST_TOPS
        require(asked, "top_logprobs", self.top_logprobs, f"a whole number from 0 to {MOST_TOPS}")
        length = len(self.prompt_ids)
        require(length >= 1, "prompt", "no tokens", "one token or more")
        if context - length < self.max_tokens:
            raise InputError(
                f"prompt: {length} tokens and max_tokens {self.max_tokens} exceed the model's context of {context}; "
                f"accepted: together at most {context}"
            )
        ids = np.asarray(self.prompt_ids)
        valid = ids.dtype.kind in "iu" and int(ids.min()) >= 0 and int(ids.max()) < vocab_size
        require(valid, "prompt", "a token id out of range", f"ids from 0 to {vocab_size - 1}")
        if family.mask_token_id is not None and (masks := (ids == family.mask_token_id).nonzero()[0]).size:
            where = f"the mask token {family.mask_token_id} at position {masks[0]}"  # decoding would fill it
            require(False, "prompt", where, "ids of a text, without the mask's")

    def canvas_size(self, decoder: Decoder, family: Family, context: int) -> tuple[int, int]:
        """(response positions, positions a block): `max_tokens` rounded up to whole blocks.

        A context too short for whole blocks shortens the last one instead of refusing the request.
        """
        chosen, prompt = self.decoder or decoder, len(self.prompt_ids)
        block = chosen.block_length(family, self.max_tokens)
        head = prompt if chosen.schedule.aligned else 0
        size = -(-(head + self.max_tokens) // block) * block - head
        return min(size, context - prompt), block

    def positions(self, decoder: Decoder, family: Family, context: int) -> int:
        """Positions that prompt and canvas take together."""
        return len(self.prompt_ids) + self.canvas_size(decoder, family, context)[0]

    def canvas(self, decoder: Decoder, family: Family, context: int) -> Canvas:
        """The request's canvas before its first forward."""
        chosen = self.decoder or decoder
        size, block = self.canvas_size(decoder, family, context)
        ends = () if self.ignore_eos else family.stop_token_ids
        fill = family.eos_token_id if family.mask_token_id is None else family.mask_token_id
        return Canvas(
            self.prompt_ids,
            size,
            block,
            fill,
            aligned=chosen.schedule.aligned,
            created=chosen.schedule.initial_blocks,
            stop_ids=(*ends, *self.stop_token_ids),
        )


@dataclass(frozen=True)
class Completion:
    """A finished request. Lists over the canvas have one entry for each response position."""

    token_ids: list[int]  # the answer: before the stop token, at most max_tokens
    finish_reason: str  # "stop" or "length"
    forwards: int  # model forwards in which the request took part, full and refresh ones included
    response_ids: list[int]  # the whole canvas, stop token and padding included
    reveal_steps: list[int]  # 0-based forward that revealed each position
    reveal_entropies: list[float]  # nats, at the reveal
    reveal_logprobs: list[float]  # of the revealed token at its reveal, before temperature and filters

    @staticmethod
    def of(canvas: Canvas, end: int, reason: str) -> Completion:
        """What a canvas holds, with the answer [0, end)."""
        return Completion(
            token_ids=canvas.response[:end].tolist(),
            finish_reason=reason,
            forwards=canvas.forwards,
            response_ids=canvas.response.tolist(),
            reveal_steps=canvas.reveal_step.tolist(),
            reveal_entropies=canvas.reveal_entropy.tolist(),
            reveal_logprobs=canvas.reveal_logprob.tolist(),
        )


@dataclass(frozen=True)
class Reveal:
    """What one forward revealed: response positions with their tokens, entropies (nats) and log probabilities.

    Positions before `opened` are in blocks that exist, those before `frozen` have keys that stay as they are. `tops`:
    for each position the most probable tokens with their log probabilities, as many as the request asks for.
    """

    forward: int  # 0-based, of the request
    positions: list[int]
    token_ids: list[int]
    entropies: list[float]
    logprobs: list[float]
    size: int
    block_size: int
    opened: int
    frozen: int
    tops: list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Event:
    """What a step changed for one request.

    `token_ids` extend the committed answer: text once told never changes. At the end there is a `completion`, or an
    `error` for a request that failed alone.
    """

    request_id: int
    token_ids: list[int]
    forwards: int  # of the request so far
    completion: Completion | None = None
    reveal: Reveal | None = None
    error: str | None = None


@dataclass(slots=True)
class ActiveRequest:
    """A request that is being decoded."""

    request_id: int
    request: Request
    decoder: Decoder
    canvas: Canvas
    base: int | None  # place of its canvas in the KV pool, where its decoder uses one
    sent: int = 0  # answer tokens reported so far
    opening: Opening | None = None  # of the forward in hand
    repeat: Opening | None = None  # of a forward that reveals nothing, to come
    guidance: float = field(init=False)  # scale of classifier-free guidance
    sampled: bool = field(init=False)  # a token may be another than the most probable one

    def __post_init__(self) -> None:
        request = self.request
        self.guidance = float(getattr(self.decoder.selection, "cfg_scale", 0.0))
        self.sampled = request.temperature > 0 or request.top_p < 1 or request.top_k > 0

    def reveal(self, statistics: TokenStatistics, rules: FamilyRules, eos_id: int) -> Event | None:
        """Take over a forward: `statistics` has a row for each position that was open in it.

        The event has newly committed answer tokens, and the completion when the request is finished.
        """
        canvas, opening = self.canvas, self.opening
        assert opening is not None
        self.repeat = None
        if not opening.eligible.size:
            return self._event(None, eos_id)
        flags, forced = self.decoder.selection.select(canvas, opening, statistics, rules, self.request.seed)
        chosen = flags.nonzero()[0]
        predicted = statistics.sampled if forced is None else np.where(forced, statistics.argmax, statistics.sampled)
        positions, tokens, entropies = opening.eligible[chosen], predicted[chosen], statistics.entropy[chosen]
        logprobs = statistics.logprob[chosen]
        canvas.commit(positions, tokens, entropies, logprobs)
        if self.decoder.early_stop:
            canvas.fill_after_stop(eos_id)
        if canvas.repeat and not canvas.masked[opening.start : opening.end].any():
            self.repeat = opening._replace(eligible=opening.eligible[:0])
        shown = None
        if self.request.reveals:
            frozen = max(canvas.cached - canvas.prompt_length, 0)
            extent = canvas.size, canvas.block_size, canvas.created_end, frozen
            figures = entropies.tolist(), logprobs.tolist()
            tops = statistics.most_probable(chosen, self.request.top_logprobs)
            shown = Reveal(canvas.forwards - 1, positions.tolist(), tokens.tolist(), *figures, *extent, tops)
        return self._event(shown, eos_id)

    def failed(self) -> Event:
        """The end of a request whose logits are not finite."""
        forward = self.canvas.forwards
        error = f"request {self.request_id}: the model's logits are NaN or infinite in forward {forward}"
        return Event(self.request_id, [], forward, error=error)

    def _event(self, shown: Reveal | None, eos_id: int) -> Event | None:
        canvas = self.canvas
        committed = canvas.committed
        end = min(committed, self.request.max_tokens)
        stopped = canvas.stop is not None and canvas.stop < end
        if canvas.stop is not None:
            end = min(end, canvas.stop)
        new: list[int] = canvas.response[self.sent : end].tolist()
        self.sent = max(self.sent, end)
        if self.repeat is not None or not self._finished(committed):
            return Event(self.request_id, new, canvas.forwards, None, shown) if new or shown else None
        canvas.fill(eos_id)
        completion = Completion.of(canvas, end, "stop" if stopped else "length")
        return Event(self.request_id, new, canvas.forwards, completion, shown)

    def _finished(self, committed: int) -> bool:
        """Nothing that may be returned is masked; a growing canvas also ends with its stop token's blocks."""
        if committed >= self.request.max_tokens:
            return True
        canvas = self.canvas
        return self.decoder.schedule.growing and canvas.stop is not None and committed >= canvas.created_end
