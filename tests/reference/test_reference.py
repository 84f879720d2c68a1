"""The oracles themselves: the network against the model's forward, decoders against the published code's answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from d3llm_ray.models import BlockCausal, Family, Ragged, Transformer, load_model

from . import d3llm, d3llm_nocache, dparallel, vanilla_llada
from .answer import Answer, Conventions
from .examples import random_model
from .network import Network

GOLDEN_DECODERS: dict[str, Callable[..., Answer]] = {
    "vanilla": vanilla_llada.decode,
    "dparallel": dparallel.decode,
    "d3llm-nocache": d3llm_nocache.decode,
    "d3llm": d3llm.decode,
}
PRESETS = {"llada": set(GOLDEN_DECODERS), "dream": {"dparallel", "d3llm-nocache"}}


def _conventions(family: Family, model: Transformer) -> Conventions:
    return Conventions(
        mask_id=family.mask_token_id,
        eos_id=family.eos_token_id,
        stop_ids=family.stop_token_ids,
        shift=family.logit_shift,
        dream_rules=family.name == "dream",
        vocabulary=model.config.vocab_size,
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("block_size", "origin"), [(None, 0), (4, 0), (4, 6), (1, 0)])
def test_the_network_equals_the_models_forward(kv_heads: int, block_size: int | None, origin: int) -> None:
    model = random_model(kv_heads, bias=kv_heads == 2)
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 9, 7, 9, 36, 0, 2]

    def block(position: int) -> int:
        return -1 if position < origin else (position - origin) // (block_size or len(ids))

    def sees(query: int, key: int) -> bool:
        return block_size is None or block(key) <= block(query)

    rows = Network(model).forward(ids, 0, len(ids), Network(model).store(), sees)
    pattern = None if block_size is None else BlockCausal(block_size, origin)
    with torch.no_grad():
        expected = model.logits(model(torch.tensor(ids), Ragged.build([len(ids)], pattern=pattern)))
    torch.testing.assert_close(torch.stack([rows[p] for p in range(len(ids))]), expected, atol=1e-4, rtol=1e-4)


def test_a_window_attends_to_stored_keys_and_replaces_its_own() -> None:
    network = Network(random_model())
    before, after = [3, 1, 4, 1, 5, 9, 2, 6], [30, 31, 32, 1, 7, 8, 2, 6]
    store = network.store()
    network.forward(before, 0, 8, store)
    window = network.forward(after, 3, 6, store)
    again = network.forward(after, 3, 6, store)  # same keys: nothing outside the window has changed
    assert sorted(window) == [3, 4, 5]
    for position in window:
        torch.testing.assert_close(window[position], again[position])
    full = network.forward(after, 0, 8, network.store())
    assert not torch.allclose(window[4], full[4], atol=1e-2)  # the stored keys are those of `before`
    mixed = network.forward([*before[:3], *after[3:]], 0, 8, network.store())[4]
    assert not torch.allclose(window[4], mixed, atol=1e-2)  # nor were they refreshed by the window


@pytest.mark.parametrize(("family", "stride"), [("llada", 11), ("dream", 7)])
def test_tokens_and_forwards_equal_the_published_code(golden: Path, family: str, stride: int) -> None:
    model, loaded = load_model(golden / f"tiny_{family}")
    network, conventions = Network(model), _conventions(loaded, model)
    cases = json.loads((golden / f"{family}_given.json").read_text())["decode"]
    cases = [case for case in cases if not case["settings"].get("early_stop")][::stride]
    assert {case["preset"] for case in cases} == PRESETS[family]
    for case in cases:
        settings = {"early_stop": False} | case["settings"]
        size = settings.pop("max_tokens")
        decode = GOLDEN_DECODERS[case["preset"]]
        answer = decode(network, case["prompt_ids"], size, conventions=conventions, **settings)
        assert (answer.response_ids, answer.forwards) == (case["response_ids"], case["forwards"]), case["settings"]


def test_early_stop_agrees_up_to_the_first_stop_token(golden: Path) -> None:
    """Behind the first eos the published code differs on purpose (its tail can be overwritten)."""
    model, loaded = load_model(golden / "tiny_llada")
    network, conventions = Network(model), _conventions(loaded, model)
    cases = json.loads((golden / "llada_given.json").read_text())["decode"]
    cases = [case for case in cases if case["settings"].get("early_stop")][::20]
    stopped = 0
    for case in cases:
        settings = dict(case["settings"])
        size = settings.pop("max_tokens")
        answer = GOLDEN_DECODERS[case["preset"]](network, case["prompt_ids"], size, conventions=conventions, **settings)
        expected = case["response_ids"]
        end = expected.index(conventions.eos_id) + 1 if conventions.eos_id in expected else size
        stopped += end < size
        assert answer.response_ids == expected[:end] + [conventions.eos_id] * (size - end), case["settings"]
        assert abs(answer.forwards - case["forwards"]) <= 1 and answer.forwards <= case["reported_nfe"]
    assert stopped > 4
