"""The engine against `tests/reference`: the same tokens, reveal steps and forwards for every decoder."""

from __future__ import annotations

from functools import cache
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from d3llm_ray.decoding import Completion, Engine, Request, decoder
from d3llm_ray.decoding.sampling import uniforms
from d3llm_ray.errors import InputError
from d3llm_ray.models import Family, Transformer
from d3llm_ray.models.families import read_family
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
from tests.reference.answer import Answer, Conventions
from tests.reference.network import Network

CONTEXT, MASK, EOS, VOCABULARY = 160, 36, 1, 35
MODEL_TYPES = {"llada": "llada", "dream": "Dream", "block_diffusion": "Fast_dLLM_Qwen", "causal": "qwen2"}
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


@cache
def _loaded(kind: str) -> tuple[Transformer, Family, Network, Conventions]:
    """Two random layers in one family's conventions, with logits peaked enough to reveal several tokens at once."""
    ids = {"vocab_size": 37, "mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": EOS}
    if kind == "llada":
        config: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 48, "rope_theta": 1e4}
        config |= {"max_sequence_length": CONTEXT, "rms_norm_eps": 1e-5}
    else:
        config = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        config |= {"intermediate_size": 48, "max_position_embeddings": CONTEXT, "rope_theta": 1e4, "rms_norm_eps": 1e-5}
    shape, family = read_family({"model_type": MODEL_TYPES[kind], **ids, **config}, {"block_size": 8})
    torch.manual_seed(1)
    model = Transformer(shape).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    shift = kind != "llada"
    mask = None if kind == "causal" else MASK
    return model, family, Network(model), Conventions(mask, EOS, (EOS,), shift, shift, VOCABULARY)


def _decode(kind: str, preset: str, prompt: list[int], limit: int, **options: Any) -> Completion:
    model, family, _, _ = _loaded(kind)
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
    _, _, network, conventions = _loaded(kind)
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
    _assert_equal(done, reference.decode(network, prompt, size, conventions=conventions, limit=limit, **given_options))


prompts = st.lists(st.integers(2, 34), min_size=1, max_size=21)
limits = st.integers(1, 30)
blocks = st.sampled_from([3, 4, 8, 16])
both = st.sampled_from(["llada", "dream"])
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


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
            "entropy_threshold": st.floats(0, 4),
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
            "confidence_threshold": st.floats(0, 1),
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


@given(both, prompts, limits, st.fixed_dictionaries({"entropy_threshold": st.floats(0, 4), **multi_block}))
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
            "entropy_threshold": st.floats(0, 4),
            "cache_delay": st.integers(1, 4),
            "refresh_interval": st.sampled_from([1, 2, 3, 5, 10000]),
            **multi_block,
        }
    ),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_d3llm(suffix, kind, prompt, limit, options) -> None:
    _compare(kind, "d3llm", prompt, limit, suffix=suffix, **options)


@given(both, prompts, limits, st.fixed_dictionaries({"confidence_threshold": st.floats(0, 1), **multi_block}))
@settings(max_examples=40, deadline=None)
def test_d2f(kind, prompt, limit, options) -> None:
    _compare(kind, "d2f", prompt, limit, **options)


@given(
    st.sampled_from(["dream", "block_diffusion"]),
    prompts,
    limits,
    st.sampled_from([(4, 2), (8, 4), (9, 3), (16, 8), (8, 8)]),
    st.floats(0, 1),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
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
    model, family, _, _ = _loaded(kind)
    with pytest.raises(InputError, match=reason):
        Engine(model, family, decoder(preset))
