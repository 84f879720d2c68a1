"""Memory: the pool of positions, the plan, waiting for room, and requests that fail alone."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d3llm_ray.decoding import DiffusionLLM, Engine, Request, decoder
from d3llm_ray.decoding.memory import PositionPool
from d3llm_ray.decoding.request import Event
from d3llm_ray.errors import DecodingError, InputError
from d3llm_ray.models import KVCache, Transformer
from tests.decoding.models import VOCABULARY, decode_all, engine_for, loaded, random_request

POISON = VOCABULARY - 1  # a prompt token that the engines below never predict


# The pool


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=60))
@settings(max_examples=300, deadline=None)
def test_the_pool_agrees_with_a_bitmap(positions: int, actions: list[tuple[bool, int]]) -> None:
    pool, used = PositionPool(positions), [False] * positions
    held: list[tuple[int, int]] = []
    for take, number in actions:
        if take:
            start = pool.take(number)
            room = [begin for begin in range(positions - number + 1) if not any(used[begin : begin + number])]
            assert (start is None) == (not room), "refused only where no free run is long enough"
            if start is not None:
                assert start in room
                used[start : start + number] = [True] * number
                held.append((start, number))
        elif held:
            start, length = held.pop(number % len(held))
            pool.give_back(start, length)
            used[start : start + length] = [False] * length
        assert pool.free == used.count(False)
    for start, length in held:
        pool.give_back(start, length)
    assert pool.free == positions and pool.take(positions) == 0 and pool.take(1) is None


def test_a_request_that_the_pool_can_never_hold_is_refused() -> None:
    engine = engine_for("llada", decoder("d3llm"), kv_positions=40)
    with pytest.raises(InputError, match=r"need 41 positions.*at most 40 \(kv_positions\)"):
        engine.submit(Request([5] * 25, 12))  # a canvas of two blocks of 8
    assert engine.waiting == 0
    engine.submit(Request([5] * 24, 12))
    engine.submit(Request([5] * 60, 12, decoder=decoder("vanilla")))  # needs none
    with pytest.raises(InputError, match="kv_positions"):
        engine_for("llada", decoder("d3llm"), kv_positions=0)


def test_a_pool_for_two_decodes_two_at_a_time() -> None:
    rng = random.Random(2)
    prompts = [[rng.randrange(2, 34) for _ in range(10)] for _ in range(9)]
    requests = [Request(prompt, 16, temperature=rng.choice([0.0, 1.0]), seed=4) for prompt in prompts]
    expected = decode_all(engine_for("llada", decoder("d3llm")), requests)
    engine = engine_for("llada", decoder("d3llm"), kv_positions=2 * 26 + 25)
    ids, done = [engine.submit(request) for request in requests], {}
    busiest = 0
    while engine.active or engine.waiting:
        events = engine.step()
        finished = {event.request_id: event.completion for event in events if event.completion is not None}
        busiest = max(busiest, engine.active + len(finished))
        done.update(finished)
    assert busiest == 2
    for request_id, one in zip(ids, expected, strict=True):
        assert (done[request_id].response_ids, done[request_id].reveal_steps) == (one.response_ids, one.reveal_steps)


@pytest.mark.parametrize("kind", ["llada", "dream", "causal"])
def test_a_crowded_pool_changes_no_answer(kind: str) -> None:
    rng = random.Random(9)
    requests = [random_request(rng, kind) for _ in range(40)]
    assert requests[0].decoder is not None
    large = decode_all(engine_for(kind, requests[0].decoder), requests)
    small = decode_all(engine_for(kind, requests[0].decoder, kv_positions=60), requests)
    for one, other in zip(large, small, strict=True):
        assert (one.response_ids, one.forwards) == (other.response_ids, other.forwards)


def test_cancelling_frees_the_span() -> None:
    engine = engine_for("llada", decoder("d3llm"), kv_positions=26)
    first, second, third = (engine.submit(Request([token] * 10, 16)) for token in (5, 6, 7))
    engine.step()
    assert (engine.active, engine.waiting) == (1, 2)
    assert engine.cancel(second) is None  # it had not begun
    aborted = engine.cancel(first)
    assert aborted is not None and aborted.finish_reason == "abort"
    assert (engine.active, engine.waiting) == (0, 1)
    finished: list[Event] = []
    while engine.active or engine.waiting:
        finished += [event for event in engine.step() if event.completion is not None]
    expected = decode_all(engine_for("llada", decoder("d3llm")), [Request([7] * 10, 16)])
    assert [event.request_id for event in finished] == [third]
    assert finished[0].completion == expected[0]


def test_the_plan_adds_up_by_hand(tiny_checkpoint: Path) -> None:
    llm = DiffusionLLM.from_pretrained(tiny_checkpoint, max_batch_size=4)
    plan, vocabulary = llm.engine.memory_plan(), llm.engine.vocabulary_size
    # Hidden size 32, MLP 64, two layers of two heads of 16, context 256, float32.
    layer = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert plan.weights == 4 * (2 * vocabulary * 32 + 2 * layer + 32)
    assert plan.bytes_per_position == 2 * 2 * 2 * 16 * 4
    assert plan.kv_positions == 4 * 256 and plan.kv_pool == 4 * 256 * 512
    # 512 packed tokens: 8 activations of width 64, keys and values of a layer twice, 3 copies of the logits.
    assert plan.max_forward_tokens == 512
    assert plan.activations == 512 * (8 * 64 * 4 + 2 * 256) + 3 * 4 * 512 * vocabulary
    lines = plan.lines()
    amounts = (("weights", plan.weights), ("KV pool", plan.kv_pool), ("activations", plan.activations))
    for line, (name, amount) in zip(lines[1:], amounts, strict=True):
        assert re.match(rf" *{name} +{amount / 2**30:.3f} GiB", line)
    assert "cpu" in lines[0] and "1024 positions of 0.5 KiB" in lines[2] and "512 tokens" in lines[3]


# Requests that fail alone


class Poisoned:
    """A model that says `value` about every sequence with the poison in its prompt, from hidden states or from keys."""

    def __init__(self, model: Transformer, value: float, where: str) -> None:
        self.model, self.value, self.where = model, value, where
        self.config, self.embed_tokens, self.parameters = model.config, model.embed_tokens, model.parameters
        self.logits = model.logits

    def __call__(self, token_ids: Tensor, ragged: Any, cache: KVCache | None, rows: Tensor) -> Tensor:
        hidden: Tensor = self.model(token_ids, ragged, cache, rows)
        packed = ragged.rows
        for row in packed[token_ids == POISON].unique().tolist():
            if cache is not None:
                begin = ragged.bases[row]
                cache.keys[:, begin : begin + ragged.key_lengths[row]] = self.value
                cache.values[:, begin : begin + ragged.key_lengths[row]] = self.value
            if cache is None or self.where == "hidden":
                hidden[packed[rows] == row] = self.value
        return hidden


@pytest.mark.parametrize("where", ["hidden", "keys"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("kind", "preset", "options"),
    [
        ("llada", "vanilla", {}),
        ("llada", "vanilla", {"cfg_scale": 1.5}),
        ("llada", "fast-dllm-dual", {}),
        ("llada", "fast-dllm-prefix", {}),
        ("llada", "d2f", {}),
        ("llada", "d3llm", {"suffix": "recompute"}),
        ("llada", "d3llm", {"suffix": "cached"}),
        ("llada", "d3llm", {"suffix": "none"}),
        ("dream", "d3llm", {}),
        ("block_diffusion", "fast-dllm-v2", {"block_size": 8, "sub_block_size": 4}),
        ("causal", "autoregressive", {}),
    ],
)
def test_a_request_fails_alone(kind: str, preset: str, options: dict[str, Any], value: float, where: str) -> None:
    chosen = decoder(preset, **options)
    if "confidence_threshold" in chosen.settings():
        chosen = chosen.override(confidence_threshold=1.0)  # several forwards a block, that the cache is read
    victim = Request([9, POISON, *[9] * 8], 22, temperature=0.7, decoder=chosen)
    others = [Request([token] * 10, 22, temperature=token % 2, decoder=chosen) for token in (5, 6, 7, 8)]
    others.append(Request([11] * 10, 22, top_p=0.7, temperature=1.0, decoder=chosen))
    model, family, _, _ = loaded(kind)
    poisoned: Any = Poisoned(model, value, where)
    size, _ = victim.canvas_size(chosen, family, 160)
    # Room for three: those that follow can only begin in spans that were freed, the poisoned one among them.
    room = 3 * (len(victim.prompt_ids) + size)
    engine = Engine(poisoned, family, chosen, max_batch_size=3, vocabulary_size=POISON, kv_positions=room)
    neighbour = engine.submit(others[0])
    bad = engine.submit(victim)
    ids = [neighbour, *(engine.submit(request) for request in others[1:])]
    done, errors = {}, []
    while engine.active or engine.waiting:
        for event in engine.step():
            if event.error is not None:
                errors.append((event.request_id, event.error))
            if event.completion is not None:
                done[event.request_id] = event.completion
    assert [request_id for request_id, _ in errors] == [bad]
    assert f"request {bad}:" in errors[0][1] and "NaN or infinite" in errors[0][1]
    assert engine.pool.free == engine.pool.positions
    expected = decode_all(Engine(model, family, chosen, vocabulary_size=POISON), others)
    for request_id, one in zip(ids, expected, strict=True):
        assert (done[request_id].response_ids, done[request_id].forwards) == (one.response_ids, one.forwards)


def test_generate_names_the_prompt_that_fails() -> None:
    model, family, _, _ = loaded("llada")
    poisoned: Any = Poisoned(model, math.nan, "hidden")
    engine = Engine(poisoned, family, decoder("d3llm"), vocabulary_size=POISON)
    llm = DiffusionLLM(poisoned, family, None, engine)
    with pytest.raises(DecodingError, match=r"prompts\[1\]: request 1: .*NaN or infinite in forward 1"):
        llm.generate([[5, 6], [7, POISON], [8]], max_tokens=16)
    assert engine.active == engine.waiting == 0
    healthy = DiffusionLLM(model, family, None, Engine(model, family, decoder("d3llm"), vocabulary_size=POISON))
    assert llm.generate([[5, 6], [8]], max_tokens=16) == healthy.generate([[5, 6], [8]], max_tokens=16)
