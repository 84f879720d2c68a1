"""The engine against `tests/reference`: the same tokens, reveal steps and forwards for every decoder."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings

from d3llm_ray.decoding import Completion, Engine, Request, decoder
from d3llm_ray.decoding.sampling import uniforms
from d3llm_ray.errors import InputError
from tests.decoding.models import CONTEXT, EOS, VOCABULARY, loaded
from tests.reference import (
    autoregressive,
    d2f,
    d3llm,
    d3llm_nocache,
    dparallel,
    fast_dllm_dual,
    fast_dllm_prefix,
    fast_dllm_v2,
    vanilla_dream,
    vanilla_llada,
)
from tests.reference.answer import Answer
from tests.reference.network import Network

REFERENCES = {
    "fast-dllm-prefix": fast_dllm_prefix,
    "fast-dllm-dual": fast_dllm_dual,
    "dparallel": dparallel,
    "d2f": d2f,
    "fast-dllm-v2": fast_dllm_v2,
    "d3llm-nocache": d3llm_nocache,
    "d3llm": d3llm,
    "autoregressive": autoregressive,
}


def _decode(kind: str, preset: str, prompt: list[int], limit: int, **options: Any) -> Completion:
    model, family, _, _ = loaded(kind)
    # A neighbour that joins first and has other lengths: what the request gets must not depend on it.
    chosen = decoder(preset, **options)
    engine = Engine(model, family, chosen, vocabulary_size=VOCABULARY)
    engine.submit(Request([3, 4, 5, 6, 7], 11, temperature=1.0, decoder=chosen))
    engine.step()
    request_id = engine.submit(Request(prompt, limit, seed=7, decoder=chosen))
    while engine.active or engine.waiting:
        for event in engine.step():
            if event.request_id == request_id and event.completion is not None:
                done = event.completion
    return done


def _assert_equal(done: Completion, answer: Answer) -> None:
    length = len(answer.response_ids)
    assert done.response_ids[:length] == answer.response_ids
    assert done.forwards == answer.forwards
    assert done.reveal_steps[: len(answer.reveal_steps)] == answer.reveal_steps
    if EOS in answer.response_ids:
        assert done.token_ids == answer.response_ids[: answer.response_ids.index(EOS)]
        assert done.finish_reason == "stop"


def _compare(kind: str, preset: str, prompt: list[int], limit: int, **options: Any) -> None:
    _, _, network, conventions = loaded(kind)
    block = options.get("block_size", 8)
    done = _decode(kind, preset, prompt, limit, **options)
    size = len(done.response_ids)
    if preset not in ("vanilla", "autoregressive", "fast-dllm-v2"):
        assert size == min(-(-limit // block) * block, CONTEXT - len(prompt))
    given_options = dict(options)
    if preset == "vanilla":
        rule = options["remasking"]
        reference = vanilla_llada if rule in ("low_confidence", "random") else vanilla_dream
        given_options["uniform"] = uniforms
        given_options["seed"] = 7
    else:
        reference = REFERENCES[preset]

    def decode(network: Network) -> Answer:
        return reference.decode(network, prompt, size, conventions=conventions, limit=limit, **given_options)

    answer = decode(network)
    try:
        _assert_equal(done, answer)
    except AssertionError:
        # A tie to within rounding may fall either way: such an example proves nothing. It is one if weights that are
        # off by less than rounding errors add up to give yet another answer.
        if any(decode(nudged) != answer for nudged in _nudged(kind)):
            reject()
        raise


@cache
def _nudged(kind: str) -> list[Network]:
    """The reference with every weight off by about 1e-6 of itself, in six ways."""
    networks = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        model = copy.deepcopy(loaded(kind)[0])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1 + 1e-6 * torch.randn(parameter.shape, generator=generator)
        networks.append(Network(model))
    return networks


prompts = st.lists(st.integers(2, 34), min_size=1, max_size=21)
limits = st.integers(1, 30)
blocks = st.sampled_from([3, 4, 8, 16])
# Away from the ends, where rounding alone decides whether a probability is 1 or an entropy 0.
entropies, confidences = st.floats(0.01, 4), st.floats(0.01, 0.99)
both = st.sampled_from(["llada", "dream"])
few = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("rule", ["low_confidence", "random"])
@given(
    both,
    prompts,
    limits,
    st.fixed_dictionaries(
        {
            "block_size": blocks,
            "steps": st.sampled_from([None, 3, 9, 40]),
            "cfg_scale": st.sampled_from([0.0, 0.0, 1.5]),
            "early_stop": st.booleans(),
        }
    ),
)
@few
def test_vanilla_llada(rule, kind, prompt, limit, options) -> None:
    _compare(kind, "vanilla", prompt, limit, remasking=rule, **options)


@pytest.mark.parametrize("rule", ["origin", "maskgit_plus", "topk_margin", "entropy"])
@given(both, prompts, limits, st.sampled_from([None, None, 8]), st.sampled_from([None, 3, 9]), st.booleans())
@few
def test_vanilla_dream(rule, kind, prompt, limit, block_size, steps, early_stop) -> None:
    _compare(kind, "vanilla", prompt, limit, remasking=rule, block_size=block_size, steps=steps, early_stop=early_stop)


@given(
    both,
    prompts,
    limits,
    st.fixed_dictionaries(
        {
            "block_size": blocks,
            "entropy_threshold": entropies,
            "cache": st.sampled_from(["none", "prefix", "dual"]),
            "early_stop": st.booleans(),
        }
    ),
)
@few
def test_dparallel(kind, prompt, limit, options) -> None:
    _compare(kind, "dparallel", prompt, limit, **options)


@pytest.mark.parametrize("preset", ["fast-dllm-prefix", "fast-dllm-dual"])
@given(
    both,
    prompts,
    limits,
    st.fixed_dictionaries(
        {
            "block_size": blocks,
            "confidence_threshold": confidences,
            "factor": st.sampled_from([None, None, 0.4, 1.0, 3.0]),
            "early_stop": st.booleans(),
        }
    ),
)
@few
def test_fast_dllm(preset, kind, prompt, limit, options) -> None:
    _compare(kind, preset, prompt, limit, **options)


multi_block = {
    "block_size": blocks,
    "block_add_threshold": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    "decoded_token_threshold": st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    "early_stop": st.booleans(),
}


@given(both, prompts, limits, st.fixed_dictionaries({"entropy_threshold": entropies, **multi_block}))
@few
def test_d3llm_nocache(kind, prompt, limit, options) -> None:
    _compare(kind, "d3llm-nocache", prompt, limit, **options)


@pytest.mark.parametrize("suffix", ["recompute", "cached", "none"])
@given(
    both,
    prompts,
    limits,
    st.fixed_dictionaries(
        {
            "entropy_threshold": entropies,
            "cache_delay": st.integers(1, 4),
            "refresh_interval": st.sampled_from([1, 2, 3, 5, 10000]),
            **multi_block,
        }
    ),
)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_d3llm(suffix, kind, prompt, limit, options) -> None:
    _compare(kind, "d3llm", prompt, limit, suffix=suffix, **options)


@given(both, prompts, limits, st.fixed_dictionaries({"confidence_threshold": confidences, **multi_block}))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_d2f(kind, prompt, limit, options) -> None:
    _compare(kind, "d2f", prompt, limit, **options)


@given(
    st.sampled_from(["dream", "block_diffusion"]),
    prompts,
    limits,
    st.sampled_from([(4, 2), (8, 4), (9, 3), (16, 8), (8, 8)]),
    confidences,
    st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_fast_dllm_v2(kind, prompt, limit, sizes, threshold, block_cache) -> None:
    options = {"confidence_threshold": threshold, "block_cache": block_cache}
    _compare(kind, "fast-dllm-v2", prompt, limit, block_size=sizes[0], sub_block_size=sizes[1], **options)


@given(prompts, limits)
@few
def test_autoregressive(prompt, limit) -> None:
    _compare("causal", "autoregressive", prompt, limit)


@pytest.mark.parametrize(
    ("kind", "preset", "reason"),
    [
        ("causal", "d3llm", "causal and has no mask token"),
        ("causal", "fast-dllm-v2", "causal and has no mask token"),
        ("block_diffusion", "d3llm", "block-causal attention"),
        ("block_diffusion", "vanilla", "block-causal attention"),
        ("llada", "fast-dllm-v2", "unshifted logits"),
        ("llada", "autoregressive", "accepted: a causal model"),
    ],
)
def test_a_checkpoint_that_cannot_be_decoded_so_is_refused_with_the_reason(kind, preset, reason) -> None:
    model, family, _, _ = loaded(kind)
    with pytest.raises(InputError, match=reason):
        Engine(model, family, decoder(preset))
