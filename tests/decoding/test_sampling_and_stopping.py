"""Sampling fields, stop tokens, stop strings, and what a completion says about its reveals."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import d3llm_ray.decoding.engine as engine_module
from d3llm_ray.decoding import Completion, DiffusionLLM, Engine, Request, Reveal, decoder
from d3llm_ray.decoding.api import Output
from d3llm_ray.errors import InputError
from tests.decoding.models import (
    CONTEXT,
    EOS,
    MASK,
    VOCABULARY,
    decode_all,
    engine_for,
    loaded,
    presets_of,
    random_decoder,
    random_request,
)

KINDS = ["llada", "dream", "block_diffusion", "causal"]


def _decode(kind: str, preset: str, request: Request, **options: Any) -> Completion:
    return decode_all(engine_for(kind, decoder(preset, **options)), [request])[0]


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 0.0}, "top_p: got 0.0; accepted: a number above 0, at most 1"),
        ({"top_p": 1.01}, "top_p: got 1.01; accepted: a number above 0, at most 1"),
        ({"top_p": math.nan}, "top_p: got nan; accepted: a number above 0, at most 1"),
        ({"top_k": -1}, "top_k: got -1; accepted: a whole number, 0 (off) or more"),
        ({"top_k": 2.0}, "top_k: got 2.0; accepted: a whole number, 0 (off) or more"),
        ({"top_k": True}, "top_k: got True; accepted: a whole number, 0 (off) or more"),
        ({"temperature": -0.1}, "temperature: got -0.1; accepted: a number, 0 or more"),
        ({"temperature": math.inf}, "temperature: got inf; accepted: a number, 0 or more"),
        ({"temperature": math.nan}, "temperature: got nan; accepted: a number, 0 or more"),
        ({"stop_token_ids": [37]}, "stop_token_ids: got 37; accepted: ids from 0 to 36"),
        ({"stop_token_ids": [3, -1]}, "stop_token_ids: got -1; accepted: ids from 0 to 36"),
        ({"stop_token_ids": ["7"]}, "stop_token_ids: got '7'; accepted: ids from 0 to 36"),
        ({"top_logprobs": -1}, "top_logprobs: got -1; accepted: a whole number from 0 to 20"),
        ({"top_logprobs": 21}, "top_logprobs: got 21; accepted: a whole number from 0 to 20"),
        ({"top_logprobs": True}, "top_logprobs: got True; accepted: a whole number from 0 to 20"),
    ],
)
def test_bad_fields_are_refused_with_their_range(fields: dict[str, Any], message: str) -> None:
    engine = engine_for("llada", decoder("d3llm"))
    with pytest.raises(InputError) as caught:
        engine.submit(Request([5, 6], 8, **fields))
    assert str(caught.value) == message
    assert engine.waiting == 0


# Filters


def test_a_top_k_beyond_any_vocabulary_filters_nothing() -> None:
    free = _decode("llada", "vanilla", Request([5, 6, 7], 20, temperature=1.5, seed=3))
    for top_k in (2**31, 2**63, 10**30):
        assert _decode("llada", "vanilla", Request([5, 6, 7], 20, temperature=1.5, seed=3, top_k=top_k)) == free


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}])
@pytest.mark.parametrize(
    ("kind", "preset", "options"),
    [
        ("llada", "vanilla", {}),
        ("dream", "d3llm", {"entropy_threshold": 4.0}),  # a forced reveal is never drawn
        ("causal", "autoregressive", {}),
    ],
)
def test_a_filter_that_leaves_one_token_is_greedy(kind: str, preset: str, options: Any, fields: Any) -> None:
    greedy = _decode(kind, preset, Request([5, 6, 7], 20), **options)
    filtered = _decode(kind, preset, Request([5, 6, 7], 20, temperature=1.5, seed=3, **fields), **options)
    assert filtered.response_ids == greedy.response_ids and filtered.reveal_steps == greedy.reveal_steps
    free = _decode(kind, preset, Request([5, 6, 7], 20, temperature=1.5, seed=3), **options)
    assert free.response_ids != greedy.response_ids


# Stop tokens


@pytest.mark.parametrize("kind", KINDS)
def test_answers_end_before_the_first_stop_token(kind: str) -> None:
    rng = random.Random(21)
    stopped = 0
    for _ in range(40):
        chosen = random_decoder(rng, kind)
        stops = rng.choice([(), (7,), (7, 8, 9, 10, 11)])
        request = random_request(rng, kind, chosen, stop_token_ids=stops, ignore_eos=rng.random() < 0.3)
        done = decode_all(engine_for(kind, chosen), [request])[0]
        ends = {*stops, *(() if request.ignore_eos else (EOS,))}
        assert len(done.token_ids) <= request.max_tokens and not ends.intersection(done.token_ids)
        assert (done.finish_reason == "stop") == (len(done.token_ids) < request.max_tokens)
        if done.finish_reason == "stop":
            assert done.response_ids[len(done.token_ids)] in ends
            stopped += 1
    assert 5 <= stopped <= 39


@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        ("llada", "vanilla"),
        ("llada", "d2f"),
        ("llada", "d3llm"),
        ("dream", "d3llm"),
        ("dream", "fast-dllm-v2"),
        ("block_diffusion", "fast-dllm-v2"),
        ("causal", "autoregressive"),
    ],
)
def test_a_stop_token_of_the_request_cuts_and_ignore_eos_does_not(kind: str, preset: str) -> None:
    sizes = {"block_size": 8, "sub_block_size": 4} if preset == "fast-dllm-v2" else {}
    found = 0
    for seed in range(6):
        free = Request([5, 6, 7, seed + 2], 24, temperature=1.0, seed=seed, ignore_eos=True)
        whole = _decode(kind, preset, free, **sizes)
        assert whole.finish_reason == "length" and len(whole.token_ids) == 24
        token = whole.token_ids[4]
        first = whole.token_ids.index(token)
        request = Request(free.prompt_ids, 24, temperature=1.0, seed=seed, ignore_eos=True, stop_token_ids=[token])
        cut = _decode(kind, preset, request, **sizes)
        if preset != "d3llm":
            # What is revealed up to the stop token's block does not depend on what stops.
            assert cut.token_ids == whole.token_ids[:first] and cut.finish_reason == "stop"
        found += cut.finish_reason == "stop"
        assert cut.forwards <= whole.forwards
        if preset == "autoregressive":
            assert cut.forwards == first + 1
        if preset == "fast-dllm-v2":
            assert cut.forwards < whole.forwards
    assert found


# Stop strings


def _stopping(tiny_checkpoint: Path) -> tuple[DiffusionLLM, Output, dict[str, Any]]:
    """A model with a tokenizer, and a long answer of it in which nothing stops."""
    llm = DiffusionLLM.from_pretrained(tiny_checkpoint, decoder="vanilla", max_batch_size=2)
    common: dict[str, Any] = {"max_tokens": 64, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    return llm, llm.generate([[9, 10, 11]], **common)[0], common


def _tokens_until(llm: DiffusionLLM, ids: Sequence[int], stop: str) -> int:
    return next(count for count in range(len(ids) + 1) if stop in llm.decode(ids[:count]))


def test_stop_strings_end_the_answer_and_free_the_slot(tiny_checkpoint: Path) -> None:
    llm, whole, common = _stopping(tiny_checkpoint)
    rng = random.Random(0)
    for _ in range(12):
        # The string spans the boundary of two tokens.
        token = rng.randrange(2, 40)
        middle, end = len(llm.decode(whole.token_ids[:token])), len(llm.decode(whole.token_ids[: token + 1]))
        stop = whole.text[max(0, middle - 2) : max(middle + 1, end - 1)]
        output = llm.generate([[9, 10, 11]], stop=[stop], **common)[0]
        assert output.text == whole.text[: whole.text.index(stop)]
        count = _tokens_until(llm, whole.token_ids, stop)
        assert output.token_ids == whole.token_ids[:count] and output.finish_reason == "stop"
        # Blocks of 16, a token a forward: decoding ends with the first forward that commits the whole string.
        committed = max(whole.reveal_steps[:count]) + 1
        assert output.forwards == committed < whole.forwards
        assert output.tokens_per_forward == count / committed
        assert llm.engine.active == llm.engine.waiting == 0


def test_partial_matches_and_absent_strings_change_nothing(tiny_checkpoint: Path) -> None:
    llm, whole, common = _stopping(tiny_checkpoint)
    for stop in (whole.text[-3:] + "\u2603", whole.text[10:14] + "\u2603", "\u2603"):
        output = llm.generate([[9, 10, 11]], stop=stop, **common)[0]
        assert output == whole
    with pytest.raises(InputError, match="stop: got ''"):
        llm.generate([[9]], stop=["a", ""])
    without = DiffusionLLM(llm.model, llm.family, None, llm.engine)
    with pytest.raises(InputError, match="stop.*no tokenizer"):
        without.generate([[9]], stop=["a"])


def test_the_string_that_is_complete_first_wins_and_neighbours_go_on(tiny_checkpoint: Path) -> None:
    llm, whole, common = _stopping(tiny_checkpoint)
    early, late = whole.text[20:24], whole.text[50:56]
    prompts = [[9, 10, 11], [12], [13, 14]]
    free = llm.generate(prompts, **common)
    stopped = llm.generate(prompts, stop=[late, early], **common)
    for one, other in zip(free, stopped, strict=True):
        ends = [(one.text.index(stop) + len(stop), one.text.index(stop)) for stop in (early, late) if stop in one.text]
        assert other.text == one.text[: min(ends)[1] if ends else len(one.text)]
    assert stopped[0].text == whole.text[: whole.text.index(early)]


# What a completion says


@pytest.mark.parametrize("kind", ["llada", "dream"])
@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "seed": 2}])
def test_reveals_agree_with_a_float64_softmax_of_a_full_forward(kind: str, fields: dict[str, Any]) -> None:
    _, family, network, _ = loaded(kind)
    prompt = [5, 9, 20, 13]
    options: dict[str, Any] = {"block_size": 8, "remasking": "low_confidence"}
    done = _decode(kind, "vanilla", Request(prompt, 24, ignore_eos=True, **fields), **options)
    assert sorted(done.reveal_steps) == list(range(24)), "one token a forward"
    canvas = [*prompt, *[MASK] * 24]
    for position in np.argsort(done.reveal_steps):
        place = len(prompt) + int(position)
        row = network.forward(canvas, 0, len(canvas), network.store())[place - family.logit_shift].double()
        logprobs = torch.log_softmax(row[:VOCABULARY], dim=-1)  # neither the mask nor ids without a token
        token = done.response_ids[position]
        assert fields or token == int(logprobs.argmax())
        assert done.reveal_logprobs[position] == pytest.approx(float(logprobs[token]), abs=2e-4)
        entropy = -float((logprobs.exp() * logprobs).sum())
        assert done.reveal_entropies[position] == pytest.approx(entropy, abs=2e-4)
        canvas[place] = token


def _reveals(engine: Engine, requests: Sequence[Request]) -> list[list[Reveal]]:
    """What every forward of the requests revealed, decoded together."""
    told: dict[int, list[Reveal]] = {engine.submit(request): [] for request in requests}
    while engine.active or engine.waiting:
        for event in engine.step():
            told[event.request_id] += [event.reveal] if event.reveal is not None else []
    return list(told.values())


@pytest.mark.parametrize("kind", ["llada", "dream"])
@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "seed": 2}])
def test_most_probable_tokens_agree_with_a_float64_softmax_of_a_full_forward(kind: str, fields: dict[str, Any]) -> None:
    """Before temperature and filters; neither the mask nor ids without a token are among them."""
    _, family, network, _ = loaded(kind)
    prompt = [5, 9, 20, 13]
    plain = decoder("vanilla", block_size=8, remasking="low_confidence")
    common: dict[str, Any] = {"ignore_eos": True, "reveals": True, **fields}
    few, many, none = (Request(prompt, 24, top_logprobs=count, **common) for count in (3, 20, 0))
    of_few, of_many, of_none = _reveals(engine_for(kind, plain), [few, many, none])
    canvas = [*prompt, *[MASK] * 24]
    for one, other, bare in zip(of_few, of_many, of_none, strict=True):
        (position,), (token,) = one.positions, one.token_ids
        assert (other.positions, other.token_ids) == (bare.positions, bare.token_ids) == ([position], [token])
        place = len(prompt) + position
        row = network.forward(canvas, 0, len(canvas), network.store())[place - family.logit_shift].double()
        expected = torch.log_softmax(row[:VOCABULARY], dim=-1).topk(20)
        (tops,) = other.tops
        assert [number for number, _ in tops] == expected.indices.tolist()
        assert [logprob for _, logprob in tops] == pytest.approx(expected.values.tolist(), abs=2e-4)
        assert one.tops == [tops[:3]] and bare.tops == [[]]
        assert dict(tops).get(token, one.logprobs[0]) == pytest.approx(one.logprobs[0], abs=1e-5)
        canvas[place] = token


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_most_probable_tokens_are_told_of_guided_and_of_static_steps(cuda_graphs: bool) -> None:
    """A step in which anybody asks is run eagerly: the answer is the same, and the surest token leads."""
    for preset, options in (("d3llm", {}), ("vanilla", {"cfg_scale": 1.5})):
        engine = engine_for("llada", decoder(preset, **options), cuda_graphs=cuda_graphs)
        (told,) = _reveals(engine, [Request([5, 9, 20], 16, ignore_eos=True, reveals=True, top_logprobs=2)])
        (plain,) = _reveals(engine, [Request([5, 9, 20], 16, ignore_eos=True, reveals=True)])
        assert [reveal.token_ids for reveal in told] == [reveal.token_ids for reveal in plain]
        for reveal in told:
            for token, logprob, tops in zip(reveal.token_ids, reveal.logprobs, reveal.tops, strict=True):
                assert tops[0][0] == token and tops[0][1] == pytest.approx(logprob, abs=1e-5)
                assert len(tops) == 2 and tops[0][1] >= tops[1][1]


@pytest.mark.parametrize(("mask", "expected"), [(MASK, {0, 1, 2, 3, 4, 5}), (3, {0, 1, 2, 4, 5})])
def test_of_a_small_vocabulary_all_tokens_are_told_and_the_mask_never(mask: int, expected: set[int]) -> None:
    model, family, _, _ = loaded("llada")
    family = replace(family, mask_token_id=mask)
    engine = Engine(model, family, decoder("vanilla", block_size=8), vocabulary_size=6)
    requests = [Request([1, 2], 8, ignore_eos=True, reveals=True, top_logprobs=count) for count in (20, 2)]
    many, few = _reveals(engine, requests)
    for one, other in zip(many, few, strict=True):
        for tops, first in zip(one.tops, other.tops, strict=True):
            assert {token for token, _ in tops} == expected
            assert sum(math.exp(logprob) for _, logprob in tops) == pytest.approx(1, abs=1e-5)
            assert first == tops[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_max_tokens_is_never_exceeded(kind: str) -> None:
    for name in presets_of(kind):
        for limit in (1, 7, 8, 9, CONTEXT - 3):
            sizes = {"block_size": 8, "sub_block_size": 4}
            chosen = decoder(name, **(sizes if name == "fast-dllm-v2" else {}))
            done = decode_all(engine_for(kind, chosen), [Request([5, 6, 7], limit, ignore_eos=True)])[0]
            assert len(done.token_ids) == limit and done.finish_reason == "length"
            assert len(done.response_ids) <= CONTEXT - 3


def test_noise_is_keyed_by_the_request_s_own_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that joins late draws what it would have drawn alone."""
    drawn: list[tuple[int, int]] = []
    original = engine_module.row_keys

    def spy(seed: int, positions: np.ndarray, forward: int) -> np.ndarray:
        drawn.append((seed, forward))
        return original(seed, positions, forward)

    monkeypatch.setattr(engine_module, "row_keys", spy)
    engine = engine_for("llada", decoder("d3llm", entropy_threshold=0.0))
    engine.submit(Request([5, 6], 8, temperature=1.0, seed=1))
    engine.step()
    engine.step()
    engine.submit(Request([7], 4, temperature=1.0, seed=2))
    while engine.active:
        engine.step()
    for seed in (1, 2):
        forwards = [forward for known, forward in drawn if known == seed]
        assert forwards == list(range(1, len(forwards) + 1)) and len(forwards) > 1
