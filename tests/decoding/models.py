"""Small random models of every family, and helpers that decode with them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from d3llm_ray.decoding import PRESETS, Completion, Decoder, Engine, Request, decoder
from d3llm_ray.errors import InputError
from d3llm_ray.models import Family, Transformer
from d3llm_ray.models.families import read_family
from tests.reference.answer import Conventions
from tests.reference.network import Network

CONTEXT, MASK, EOS, VOCABULARY = 160, 36, 1, 35
MODEL_TYPES = {"llada": "llada", "dream": "Dream", "block_diffusion": "Fast_dLLM_Qwen", "causal": "qwen2"}
# Values for every setting that a decoder may have (a new one belongs here); any combination is accepted.
SETTINGS: dict[str, list[Any]] = {
    "block_size": [None, 4, 8],
    "early_stop": [True, False],
    "sub_block_size": [1, 2, 4],
    "block_add_threshold": [0.0, 0.1, 0.5, 1.0],
    "decoded_token_threshold": [0.0, 0.5, 0.95, 1.0],
    "steps": [None, 1, 3, 40],
    "remasking": [None, "low_confidence", "random", "origin", "maskgit_plus", "topk_margin", "entropy"],
    "cfg_scale": [0.0, 0.0, 0.0, 1.5],
    "alg_temp": [0.0, 0.5],
    "eps": [1e-3, 0.1],
    "defer_stops": [False, True],
    "entropy_threshold": [0.0, 0.3, 1.0, 3.0],
    "confidence_threshold": [0.0, 0.3, 0.9, 1.0],
    "factor": [None, 0.4, 1.0, 3.0],
    "cache": ["none", "prefix", "dual"],
    "repeat_finished": [False, True],
    "cache_delay": [1, 2, 5],
    "refresh_interval": [1, 2, 5, 10000],
    "suffix": ["recompute", "cached", "none"],
    "block_cache": [True, False],
}


@cache
def loaded(kind: str) -> tuple[Transformer, Family, Network, Conventions]:
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


def engine_for(kind: str, preset: Decoder, **options: Any) -> Engine:
    """An engine over the random model of `kind`."""
    model, family, _, _ = loaded(kind)
    return Engine(model, family, preset, vocabulary_size=VOCABULARY, **options)


@cache
def presets_of(kind: str) -> tuple[str, ...]:
    """Names of the presets that can decode the family."""
    family, names = loaded(kind)[1], []
    for name, preset in PRESETS.items():
        try:
            preset.check(family)
        except InputError:
            continue
        names.append(name)
    return tuple(names)


def random_decoder(rng: random.Random, kind: str) -> Decoder:
    """A preset of the family with random settings."""
    name = rng.choice(presets_of(kind))
    return decoder(name, **{field: rng.choice(SETTINGS[field]) for field in PRESETS[name].settings()})


def random_request(rng: random.Random, kind: str, chosen: Decoder | None = None, **options: Any) -> Request:
    """A request of random length, sampling and decoder (or `chosen`)."""
    return Request(
        [rng.randrange(2, 34) for _ in range(rng.randint(1, 20))],
        rng.randint(1, 24),
        temperature=rng.choice([0.0, 0.0, 0.7, 1.5]),
        seed=rng.randrange(1000),
        decoder=chosen or random_decoder(rng, kind),
        top_p=rng.choice([1.0, 1.0, 0.8]),
        top_k=rng.choice([0, 0, 3]),
        **options,
    )


def decode_all(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Submit everything at once and step until it is done; answers in the order of `requests`."""
    ids, done = [engine.submit(request) for request in requests], {}
    while engine.active or engine.waiting:
        for event in engine.step():
            assert event.error is None, event.error
            if event.completion is not None:
                done[event.request_id] = event.completion
    return [done[request_id] for request_id in ids]
