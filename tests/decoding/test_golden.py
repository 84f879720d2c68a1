"""The engine against what the published code answered on the golden checkpoints."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from d3llm_ray.decoding import DiffusionLLM, Engine, Request, decoder
from d3llm_ray.models import load_model


def _cases(golden: Path, family: str) -> list[dict]:
    return json.loads((golden / f"{family}_given.json").read_text())["decode"]


def _decode(engine: Engine, cases: list[dict]) -> list[tuple[dict, list[int], int]]:
    """Run every case through one engine, batched; returns (case, response ids, forwards)."""
    submitted = {}
    for case in cases:
        settings = dict(case["settings"])
        max_tokens = settings.pop("max_tokens")
        settings.setdefault("early_stop", False)
        chosen = decoder(case["preset"], **settings)
        submitted[engine.submit(Request(case["prompt_ids"], max_tokens, decoder=chosen))] = case
    results = []
    while engine.active or engine.waiting:
        for event in engine.step():
            if event.completion is not None:
                done = event.completion
                results.append((submitted[event.request_id], done.response_ids, done.forwards))
    return results


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_tokens_and_forwards_equal_the_published_code(golden: Path, family: str, batch_size: int) -> None:
    model, conventions = load_model(golden / f"tiny_{family}")
    engine = Engine(model, conventions, decoder("vanilla"), max_batch_size=batch_size)
    cases = [case for case in _cases(golden, family) if not case["settings"].get("early_stop")]
    wrong = defaultdict(list)
    for case, response_ids, forwards in _decode(engine, cases):
        if response_ids != case["response_ids"] or forwards != case["forwards"]:
            wrong[case["preset"]].append((case["settings"], forwards, case["forwards"]))
    assert not wrong


def test_early_stop_agrees_up_to_the_first_stop_token(golden: Path) -> None:
    model, conventions = load_model(golden / "tiny_llada")
    engine = Engine(model, conventions, decoder("vanilla"), max_batch_size=32)
    cases = [case for case in _cases(golden, "llada") if case["settings"].get("early_stop")]
    eos = conventions.eos_token_id

    def answer(ids: list[int]) -> list[int]:
        return ids[: ids.index(eos)] if eos in ids else ids

    results = _decode(engine, cases)
    equal = sum(answer(ids) == answer(case["response_ids"]) for case, ids, _ in results)
    assert len(results) == len(cases) > 100
    assert equal >= 0.97 * len(cases)
    for case, ids, forwards in results:
        assert forwards <= case["reported_nfe"]
        if answer(ids) == answer(case["response_ids"]):
            assert abs(forwards - case["forwards"]) <= 1, case["settings"]


def test_a_causal_or_tokenizerless_model_is_handled(golden: Path) -> None:
    llm = DiffusionLLM.from_pretrained(golden / "tiny_llada", decoder="d3llm")
    output = llm.generate([[3, 66, 6, 7, 52]], max_tokens=32)[0]
    assert output.text == "" and output.prompt_tokens == 5 and len(output.response_ids) == 32
