"""Laws of the engine: batches change nothing, caches keep their books, every forward makes progress."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d3llm_ray.decoding import Completion, Engine, Request, decoder
from d3llm_ray.decoding.caches import BlockCache, DelayedCache, NoCache, PipelineCache, SubBlockCache
from d3llm_ray.decoding.canvas import Canvas
from d3llm_ray.decoding.contracts import Opening, Window
from d3llm_ray.decoding.request import Event
from d3llm_ray.decoding.rules import FamilyRules
from d3llm_ray.decoding.schedules import SequentialBlocks, SubBlocks
from tests.decoding.models import EOS, MASK, VOCABULARY, decode_all, engine_for, loaded, random_decoder, random_request

# Batch invariance


def _decode_with_churn(
    engine: Engine, requests: list[Request], cancelled: set[int], seed: int
) -> tuple[dict[int, Completion], dict[int, Completion]]:
    """Submit in random order at random steps, cancel some at random ones: (finished, aborted) by request."""
    rng = random.Random(seed)
    pending = list(range(len(requests)))
    rng.shuffle(pending)
    ids: dict[int, int] = {}
    finished: dict[int, Completion] = {}
    aborted: dict[int, Completion] = {}
    deltas: dict[int, list[int]] = {}
    while pending or engine.active or engine.waiting:
        for _ in range(min(rng.randint(0, 12), len(pending))):
            index = pending.pop()
            ids[engine.submit(requests[index])] = index
        for request_id, index in ids.items():
            if index in cancelled and index not in finished and rng.random() < 0.15:
                partial = engine.cancel(request_id)
                if partial is not None:
                    aborted[index] = partial
                    assert partial.finish_reason == "abort" and partial.token_ids == deltas.get(index, [])
        for event in engine.step():
            assert event.error is None
            index = ids[event.request_id]
            deltas.setdefault(index, []).extend(event.token_ids)
            if event.completion is not None:
                assert deltas[index] == event.completion.token_ids
                finished[index] = event.completion
    return finished, aborted


@pytest.mark.parametrize(("kind", "count"), [("llada", 200), ("dream", 200), ("block_diffusion", 60), ("causal", 60)])
def test_nothing_depends_on_the_batch(kind: str, count: int) -> None:
    rng = random.Random(11)
    requests = [random_request(rng, kind) for _ in range(count)]
    cancelled = set(rng.sample(range(count), count // 8))
    alone: dict[int, Completion] = {}
    for size in (1, 8, 64):
        engine = engine_for(kind, requests[0].decoder or decoder("d3llm"), max_batch_size=size)
        finished, aborted = _decode_with_churn(engine, requests, set() if size == 1 else cancelled, size)
        alone = alone or finished
        assert set(finished) >= set(range(count)) - cancelled
        for index, completion in finished.items():
            one = alone[index]
            assert completion.response_ids == one.response_ids, (size, requests[index])
            assert completion.token_ids == one.token_ids and completion.finish_reason == one.finish_reason
            assert (completion.forwards, completion.reveal_steps) == (one.forwards, one.reveal_steps)
            np.testing.assert_allclose(completion.reveal_logprobs, one.reveal_logprobs, atol=1e-3)
            np.testing.assert_allclose(completion.reveal_entropies, one.reveal_entropies, atol=1e-3)
        for index, partial in aborted.items():
            assert partial.token_ids == alone[index].token_ids[: len(partial.token_ids)]


# Caches


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("kind", ["llada", "dream"])
@pytest.mark.parametrize("suffix", ["recompute", "cached"])
def test_a_cache_that_freezes_nothing_changes_nothing(kind: str, suffix: str, early_stop: bool) -> None:
    rng = random.Random(5)
    for threshold in (0.3, 1.5):
        settings = {"entropy_threshold": threshold, "early_stop": early_stop}
        plain, whole = decoder("d3llm-nocache", **settings), decoder("d3llm", cache_delay=10_000, **settings)
        if suffix == "cached":  # computes the masks behind the active blocks only when refreshed
            whole = whole.override(suffix=suffix, refresh_interval=1)
        requests = [random_request(rng, kind, plain) for _ in range(15)]
        expected = decode_all(engine_for(kind, plain), requests)
        got = decode_all(engine_for(kind, whole), [replace(request, decoder=whole) for request in requests])
        for one, other in zip(expected, got, strict=True):
            assert (other.response_ids, other.forwards) == (one.response_ids, one.forwards)
            assert other.reveal_steps == one.reveal_steps


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_refreshing_in_every_forward_changes_nothing(kind: str, early_stop: bool) -> None:
    rng = random.Random(6)
    for threshold in (0.3, 1.5):
        settings = {"entropy_threshold": threshold, "early_stop": early_stop}
        plain, fresh = decoder("d3llm-nocache", **settings), decoder("d3llm", refresh_interval=1, **settings)
        requests = [random_request(rng, kind, plain) for _ in range(15)]
        expected = decode_all(engine_for(kind, plain), requests)
        got = decode_all(engine_for(kind, fresh), [replace(request, decoder=fresh) for request in requests])
        for one, other in zip(expected, got, strict=True):
            assert (other.response_ids, other.forwards) == (one.response_ids, one.forwards)
            assert other.reveal_steps == one.reveal_steps


@dataclass
class Watched:
    """A caching that checks another one's books in every forward of one request."""

    inner: Any
    written: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))  # by absolute position

    @property
    def uses_cache(self) -> bool:
        return bool(self.inner.uses_cache)

    def window(self, canvas: Canvas, opening: Opening, rules: FamilyRules) -> Window:
        before = canvas.cached
        window: Window = self.inner.window(canvas, opening, rules)
        prefix = canvas.prompt_length + canvas.committed
        assert before <= canvas.cached <= prefix, "frozen keys are those of the finished prefix, for good"
        assert not canvas.masked[: max(0, canvas.cached - canvas.prompt_length)].any()
        assert 0 <= window.start < window.end <= window.key_length <= canvas.length
        rows = canvas.prompt_length + opening.eligible - rules.logit_shift
        assert rows.size or getattr(self.inner, "repeat_finished", False), "only a repeated forward scores nothing"
        assert not rows.size or window.start <= rows.min() <= rows.max() < window.end, "scored rows are computed"
        if isinstance(self.inner, NoCache):
            assert window == Window(0, canvas.length, canvas.length)
        elif isinstance(self.inner, DelayedCache | PipelineCache):
            assert window.start <= before, "what is not frozen is computed"
            if canvas.cached == before and canvas.forwards % getattr(self.inner, "refresh_interval", 10**9) == 0:
                assert window.start == 0, "a refresh is due"
        elif isinstance(self.inner, BlockCache):
            assert canvas.cached == 0
        elif isinstance(self.inner, SubBlockCache):
            assert window.start <= before or window.start // canvas.block_size == (window.end - 1) // canvas.block_size
        if not self.written.size:
            self.written = np.zeros(canvas.length, dtype=np.bool_)
        self.written[window.start : window.end] = True
        assert self.written[: window.key_length].all(), "no key is read that was never written"
        return window


def _watched(request: Request) -> Request:
    assert request.decoder is not None
    caching: Any = Watched(request.decoder.caching)
    return replace(request, decoder=replace(request.decoder, caching=caching))


# The state machine, driven by an engine whose model says anything at all


class RandomModel:
    """In place of a transformer: random logits of random sharpness, without any computation."""

    def __init__(self, kind: str, seed: int) -> None:
        model = loaded(kind)[0]
        self.config, self.embed_tokens, self.parameters = model.config, model.embed_tokens, model.parameters
        self.noise = torch.Generator().manual_seed(seed)

    def __call__(self, token_ids: Tensor, ragged: Any, cache: Any, rows: Tensor) -> Tensor:
        shape = (len(rows), self.config.vocab_size)
        sharpness = 12 * torch.rand((len(rows), 1), generator=self.noise)
        return sharpness * torch.randn(shape, generator=self.noise)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.clone()


def _check_history(request: Request, canvas: Canvas, events: list[Event]) -> None:
    """What a request's events, one a forward, must say of its completion."""
    chosen, done = request.decoder, events[-1].completion
    assert chosen is not None and done is not None
    reveals = [event.reveal for event in events if event.reveal is not None]
    numbers = [reveal.forward for reveal in reveals]
    assert numbers == sorted(numbers) and all(reveal.positions for reveal in reveals), "reveals are told of, in order"
    idle = {*range(done.forwards)} - {*numbers}
    assert len(numbers) + len(idle) == done.forwards, "each once"
    assert not idle or getattr(chosen.caching.inner, "repeat_finished", False), "every forward reveals"
    assert 0 not in idle and len(idle) <= len(canvas.ends) and not idle & {number + 1 for number in idle}
    assert len(reveals) <= canvas.size
    told = {
        position: (token, reveal.forward)
        for reveal in reveals
        for position, token in zip(reveal.positions, reveal.token_ids, strict=True)
    }
    assert len(told) == sum(len(reveal.positions) for reveal in reveals), "nothing is revealed twice"

    answer = [token for event in events for token in event.token_ids]
    assert answer == done.token_ids and len(answer) <= request.max_tokens
    assert answer == done.response_ids[: len(answer)]
    stops = {*(() if request.ignore_eos else (EOS,)), *request.stop_token_ids}
    assert MASK not in answer and not stops.intersection(answer)
    assert all(token < VOCABULARY for token in answer)
    stopped = len(answer) < request.max_tokens
    assert done.finish_reason == ("stop" if stopped else "length")
    assert not stopped or done.response_ids[len(answer)] in stops

    # An early stop fills what is behind the stop token; the end, what was not needed for the answer.
    fill = canvas.size
    if chosen.early_stop:
        fill = min([fill, *(p + 1 for p, (token, _) in told.items() if token in stops)])
    assert done.response_ids[fill:] == [EOS] * (canvas.size - fill)
    for position in range(fill):
        if position in told:  # a revealed token never changes
            assert (done.response_ids[position], done.reveal_steps[position]) == told[position]
        else:  # not needed for the answer
            assert chosen.schedule.growing or position >= request.max_tokens
            assert done.response_ids[position] == EOS

    if isinstance(chosen.schedule, SequentialBlocks):
        blocks = [{int(np.searchsorted(canvas.ends, p, "right")) for p in reveal.positions} for reveal in reveals]
        assert all(len(block) == 1 for block in blocks), "one block at a time"
        order = [block.pop() for block in blocks]
        assert order == sorted(order)
    if isinstance(chosen.schedule, SubBlocks):
        size = chosen.schedule.sub_block_size
        spans = [{(len(request.prompt_ids) + p) // size for p in reveal.positions} for reveal in reveals]
        assert all(len(span) == 1 for span in spans)
        assert [min(span) for span in spans] == sorted(min(span) for span in spans)


@pytest.mark.parametrize(
    ("kind", "count"), [("llada", 4500), ("dream", 4500), ("block_diffusion", 500), ("causal", 500)]
)
def test_whatever_the_model_says_the_history_is_sound(kind: str, count: int) -> None:
    rng = random.Random(count)
    family = loaded(kind)[1]
    model: Any = RandomModel(kind, seed=3)
    context = model.config.max_position_embeddings
    default = random_decoder(rng, kind)
    engine = Engine(model, family, default, max_batch_size=64, vocabulary_size=VOCABULARY, kv_positions=64 * 52)
    requests: dict[int, Request] = {}
    for _ in range(count):
        stops = rng.choice([(), (), (7,), (7, 8, 9)])
        one = random_request(rng, kind, stop_token_ids=stops, ignore_eos=rng.random() < 0.3, reveals=True)
        one = _watched(replace(one, max_tokens=rng.choice([one.max_tokens, 8, 16])))
        requests[engine.submit(one)] = one
    histories: dict[int, list[Event]] = {request_id: [] for request_id in requests}
    while engine.active or engine.waiting:
        for event in engine.step():
            histories[event.request_id].append(event)
    for request_id, request in requests.items():
        canvas = request.canvas(default, family, context)
        _check_history(request, canvas, histories[request_id])


# Events


@pytest.mark.parametrize("kind", ["llada", "dream", "block_diffusion", "causal"])
def test_reveals_partition_the_canvas_and_deltas_add_up(kind: str) -> None:
    rng = random.Random(8)
    for _ in range(12):
        chosen = random_decoder(rng, kind)
        if "early_stop" in chosen.settings():
            chosen = chosen.override(early_stop=False)
        # No stop token and whole blocks: nothing is filled, so that every position is revealed by some forward.
        request = random_request(rng, kind, chosen, ignore_eos=True, reveals=True)
        size, _ = request.canvas_size(chosen, loaded(kind)[1], 160)
        engine = engine_for(kind, chosen)
        engine.submit(replace(request, max_tokens=size))
        events: list[Event] = []
        while engine.active or engine.waiting:
            events += engine.step()
        done = events[-1].completion
        assert done is not None
        told = {}
        for event in events:
            assert event.reveal is not None
            assert event.reveal.forward == event.forwards - 1
            for position, token, entropy in zip(
                event.reveal.positions, event.reveal.token_ids, event.reveal.entropies, strict=True
            ):
                assert position not in told
                told[position] = (token, entropy, event.reveal.forward)
        assert sorted(told) == list(range(size))
        assert [told[position] for position in range(size)] == list(
            zip(done.response_ids, done.reveal_entropies, done.reveal_steps, strict=True)
        )
        assert [token for event in events for token in event.token_ids] == done.token_ids == done.response_ids
