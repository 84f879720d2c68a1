"""Every option and field, set to a value of its own, arrives where it acts: the offline API, the engine, presets."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d3llm_ray.decoding import (
    PRESETS,
    DiffusionLLM,
    Engine,
    Output,
    Request,
    api,
    decoder,
    default_decoder,
    engine,
    override_known,
    read_decoder,
)
from d3llm_ray.decoding.caches import BlockCache, CausalCache, DelayedCache, NoCache, PipelineCache, SubBlockCache
from d3llm_ray.decoding.presets import plain_decoder
from d3llm_ray.decoding.remasking import TopK
from d3llm_ray.decoding.schedules import GrowingMultiBlock, MultiBlock, NextToken, SequentialBlocks, SubBlocks
from d3llm_ray.decoding.selections import (
    AllEligible,
    BlockwiseConfidence,
    ConfidenceThreshold,
    EntropyThreshold,
    SubBlockConfidence,
)
from d3llm_ray.decoding.statistics import TokenStatistics
from d3llm_ray.models.attention import sdpa_attention
from d3llm_ray.yaml_file import dump_yaml
from tests.decoding.models import EOS, SETTINGS, VOCABULARY, decode_all, engine_for, loaded


def parameters(call: Any) -> set[str]:
    """Names of a function's parameters without `self` and `**settings`."""
    named = inspect.signature(call).parameters.values()
    return {parameter.name for parameter in named if parameter.kind != parameter.VAR_KEYWORD} - {"self", "cls"}


# --- from_pretrained


def test_every_argument_of_from_pretrained_arrives(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "name_or_path": tiny_checkpoint, "decoder": "dparallel", "dtype": "bfloat16", "device": "cuda:1",
        "max_batch_size": 5, "attention": "sdpa", "cuda_graphs": False,
    }  # fmt: skip
    assert given.keys() == parameters(DiffusionLLM.from_pretrained)
    seen: dict[str, Any] = {}
    backend = object()

    def load(name: object, dtype: str, device: str) -> tuple[Any, Any]:
        seen.update(name_or_path=name, dtype=dtype, device=device)
        model, family, _, _ = loaded("llada")
        monkeypatch.setattr(model, "use_attention", lambda chosen: seen.update(used=chosen))
        return model, family

    def choose(name: str, device: torch.device) -> object:
        seen.update(attention=name, attention_device=str(device))
        return backend

    monkeypatch.setattr(api, "check_device", lambda name: seen.update(checked=name))
    monkeypatch.setattr(api, "load_model", load)
    monkeypatch.setattr(api, "choose_attention", choose)
    monkeypatch.setattr(api, "Engine", lambda *rest, **options: seen.update(options, decoder=rest[2]))
    llm = DiffusionLLM.from_pretrained(**given, entropy_threshold=0.7)
    assert llm.tokenizer is not None
    assert seen == {
        **given,
        "decoder": decoder("dparallel", entropy_threshold=0.7),
        "checked": "cuda:1",
        "attention_device": "cuda:1",
        "used": backend,
        "vocabulary_size": len(llm.tokenizer),
    }


def test_a_model_takes_the_attention_that_it_is_told() -> None:
    model = loaded("llada")[0]
    calls: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return sdpa_attention(*arguments)

    model.use_attention(counted)
    try:
        decode_all(engine_for("llada", decoder("d3llm")), [Request([5, 6], 1)])
    finally:
        model.use_attention(sdpa_attention)
    assert len(calls) == model.config.num_layers


# --- generate


def test_every_argument_of_generate_arrives(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = DiffusionLLM.from_pretrained(tiny_checkpoint, decoder="d3llm", cache_delay=3)
    of_request = {
        "max_tokens": 9, "temperature": 0.4, "seed": 11, "top_p": 0.6, "top_k": 7, "stop_token_ids": [4, 8],
        "ignore_eos": True,
    }  # fmt: skip
    others = {"prompts", "progress", "stop", "decoder", "errors"}
    assert {*of_request, *others} == parameters(DiffusionLLM.generate)
    assert {*of_request, "prompt_ids", "decoder", "reveals", "top_logprobs"} == {
        field.name for field in fields(Request)
    }
    submitted: list[Request] = []
    submit = llm.engine.submit
    monkeypatch.setattr(llm.engine, "submit", lambda request: submitted.append(request) or submit(request))
    llm.generate([[5, 6], [7]], **of_request, refresh_interval=5)
    llm.generate([[5, 6]], decoder="vanilla", steps=3)
    chosen = decoder("d3llm", cache_delay=3, refresh_interval=5)
    assert submitted == [
        Request([5, 6], decoder=chosen, **of_request),
        Request([7], decoder=chosen, **of_request),
        Request([5, 6], decoder=decoder("vanilla", steps=3)),
    ]


def test_an_output_says_what_its_completion_says_and_progress_counts_prompts() -> None:
    model, family, _, _ = loaded("llada")
    llm = DiffusionLLM(model, family, None, Engine(model, family, decoder("d3llm"), vocabulary_size=VOCABULARY))
    prompts, shown = [[5, 6, 7], [9], [11, 12]], []

    class Display:
        def update(self, done: int, **_: Any) -> None:
            shown.append(done)

    outputs = llm.generate(prompts, 20, 0.7, 3, Display())
    answers = decode_all(engine_for("llada", decoder("d3llm")), [Request(prompt, 20, 0.7, 3) for prompt in prompts])
    for prompt, output, done in zip(prompts, outputs, answers, strict=True):
        assert len(done.token_ids) < len(done.response_ids)
        assert output == Output(
            text="",
            token_ids=done.token_ids,
            finish_reason=done.finish_reason,
            prompt_tokens=len(prompt),
            prompt_ids=prompt,
            forwards=done.forwards,
            tokens_per_forward=len(done.token_ids) / done.forwards,
            reveal_steps=done.reveal_steps,
            reveal_entropies=done.reveal_entropies,
            reveal_logprobs=done.reveal_logprobs,
            response_ids=done.response_ids,
        )
    assert sorted(set(shown)) == [*range(min(shown), 4)] and shown[-1] == 3


# --- the engine


def test_every_option_of_the_engine_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, family, _, _ = loaded("llada")
    given = {"max_batch_size": 2, "vocabulary_size": 20, "kv_positions": 100, "cuda_graphs": True}
    assert {"model", "family", "decoder", *given} == parameters(Engine)
    planned: list[tuple[Any, ...]] = []
    plan = engine.plan_memory
    monkeypatch.setattr(engine, "plan_memory", lambda *values: planned.append(values) or plan(*values))
    made = Engine(model, family, decoder("d3llm"), **given)
    ((_, vocabulary, context, batch, tokens, positions, graphs),) = planned
    assert (vocabulary, context, batch, positions, graphs) == (20, 160, 2, 100, True)
    assert tokens == made.grouping.most_tokens
    assert made.memory_plan().kv_positions == made.pool.positions == made._cache.positions == 100
    assert isinstance(made.runner, engine.StaticRunner)
    requests = [Request([token, 6], 24, temperature=1.0, seed=token, ignore_eos=True) for token in (5, 6, 7)]
    ids = [made.submit(request) for request in requests]
    seen: dict[int, list[int]] = {}
    while made.active or made.waiting:
        events = made.step()
        assert made.active <= 2
        seen.update({event.request_id: event.completion.response_ids for event in events if event.completion})
    assert seen.keys() == set(ids)
    assert max(max(answer) for answer in seen.values()) < 20  # ids from 20 on have no token here
    plain = Engine(model, family, decoder("d3llm"), vocabulary_size=VOCABULARY)
    assert plain.max_batch_size == 32 and plain.runner is plain.eager
    assert max(max(done.response_ids) for done in decode_all(plain, requests)) >= 20


def test_every_field_of_a_request_reaches_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests that differ in everything, decoded together: what each row is scored, drawn and selected with."""
    one = Request([5, 6], 8, 0.5, 3, decoder("vanilla", block_size=4), 0.9, 4, (7,), False, True, 6)
    two = Request([8, 9, 10], 3, 0.25, 4, decoder("d3llm", block_size=16), 0.8, 5, (9, 11), True, False)
    assert len(fields(Request)) == 11  # a new one is set and looked for here
    made, keys, batches, selected = engine_for("llada", decoder("dparallel")), [], [], []
    draw, update = engine.row_keys, made._update
    monkeypatch.setattr(engine, "row_keys", lambda *values: keys.append(values) or draw(*values))
    monkeypatch.setattr(made, "_update", lambda batch, found: batches.append(batch) or update(batch, found))
    for selection in (TopK, EntropyThreshold):
        select = selection.select

        def spy(self: Any, *values: Any, select: Any = select) -> Any:
            selected.append((type(self), values[-1]))
            return select(self, *values)

        monkeypatch.setattr(selection, "select", spy)
    for request in (one, two):
        made.submit(request)
    events = made.step()
    rows = {0: one, 1: two}
    (first, second) = ((span.row, len(span.scored)) for span in batches[0].spans)
    sampling = batches[0].sampling
    begin = 0
    for row, count in (first, second):
        request = rows[row]
        assert count == {0: 4, 1: 16}[row]  # a block of its own decoder
        for name, values in (
            ("temperature", sampling.temperatures), ("top_p", sampling.top_ps), ("top_k", sampling.top_ks)
        ):  # fmt: skip
            np.testing.assert_allclose(values[begin : begin + count], getattr(request, name), rtol=1e-6)
        begin += count
    assert sorted((seed, forward, len(positions)) for seed, positions, forward in keys) == [(3, 1, 4), (4, 1, 16)]
    assert sorted(selected, key=str) == sorted([(TopK, 3), (EntropyThreshold, 4)], key=str)
    assert [event.request_id for event in events if event.reveal is not None] == [0]
    assert batches[0].tops == 6
    canvas = one.canvas(decoder("d3llm"), made.family, 160)
    assert (canvas.size, canvas.block_size, canvas.stop_ids) == (8, 4, {EOS, 7})
    canvas = two.canvas(decoder("vanilla"), made.family, 160)
    assert (canvas.size, canvas.block_size, canvas.stop_ids) == (16, 16, {9, 11})
    made.step()
    assert {forward for _, _, forward in keys} == {1, 2}  # noise of its own in every forward
    assert {request_id: len(row.request.prompt_ids) for request_id, row in enumerate(made._rows)} == {0: 2, 1: 3}


def test_margins_are_there_when_any_request_ranks_by_them() -> None:
    """The second of two: its answer is the one that it has alone."""
    margin = decoder("vanilla", remasking="topk_margin")
    requests = [Request([5, 6], 24, decoder=decoder("vanilla")), Request([7, 8, 9], 16, decoder=margin)]
    together = decode_all(engine_for("dream", decoder("vanilla")), requests)
    (alone,) = decode_all(engine_for("dream", decoder("vanilla")), requests[1:])
    (plain,) = decode_all(engine_for("dream", decoder("vanilla")), [Request([7, 8, 9], 16)])
    assert together[1].reveal_steps == alone.reveal_steps != plain.reveal_steps


def test_the_block_is_the_decoders_or_the_models_own() -> None:
    family = loaded("llada")[1]
    assert family.block_size == 8
    sizes = {name: Request([5], 20).canvas_size(PRESETS[name], family, 160) for name in ("d3llm", "autoregressive")}
    assert sizes == {"d3llm": (24, 8), "autoregressive": (20, 1)}
    assert Request([5], 20).canvas_size(decoder("d3llm", block_size=16), family, 160) == (32, 16)
    assert Request([5], 20, decoder=decoder("d3llm", block_size=4)).canvas_size(PRESETS["d3llm"], family, 160) == (
        20,
        4,
    )
    dream = loaded("dream")[1]
    assert Request([5], 20).canvas_size(PRESETS["vanilla"], dream, 160) == (20, 20)  # its plain samplers know no blocks


# --- decoders

# Schedule, selection, caching and early stop of every preset, by the papers that they are named after.
PARTS = {
    "vanilla": (SequentialBlocks, TopK, NoCache, False),
    "fast-dllm-prefix": (SequentialBlocks, ConfidenceThreshold, BlockCache, False),
    "fast-dllm-dual": (SequentialBlocks, ConfidenceThreshold, BlockCache, False),
    "dparallel": (SequentialBlocks, EntropyThreshold, BlockCache, False),
    "d2f": (GrowingMultiBlock, BlockwiseConfidence, PipelineCache, False),
    "fast-dllm-v2": (SubBlocks, SubBlockConfidence, SubBlockCache, False),
    "d3llm-nocache": (MultiBlock, EntropyThreshold, NoCache, True),
    "d3llm": (MultiBlock, EntropyThreshold, DelayedCache, True),
    "autoregressive": (NextToken, AllEligible, CausalCache, False),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_made_of_its_parts(name: str) -> None:
    made = PRESETS[name]
    assert (type(made.schedule), type(made.selection), type(made.caching), made.early_stop) == PARTS[name]
    cache = {"fast-dllm-prefix": "prefix", "fast-dllm-dual": "dual", "dparallel": "none"}
    assert getattr(made.caching, "cache", None) == cache.get(name)


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_of_a_decoder_arrives_in_its_part(name: str, tmp_path: Path) -> None:
    """By an override, a settings file, a file with an override, and as one of many decoders."""
    base = PRESETS[name]
    given = {field: next(value for value in SETTINGS[field] if value != own) for field, own in base.settings().items()}
    if name == "fast-dllm-v2":
        given |= {"block_size": 8, "sub_block_size": 4}
    file, elsewhere = tmp_path / "mine.yaml", tmp_path / "plain.yaml"
    file.write_text(dump_yaml({"decoder": name, **given}))
    elsewhere.write_text(f"decoder: {name}\n")
    for made in (
        base.override(**given),
        decoder(name, **given),
        read_decoder(file),
        read_decoder(elsewhere, **given),
        override_known([base, PRESETS["vanilla"], PRESETS["d3llm"]], given)[0],
    ):
        assert made.settings() == given
        for part in (made.schedule, made.selection, made.caching):
            assert all(getattr(part, field.name) == given[field.name] for field in fields(part))
        if given:
            assert (made.block_size, made.early_stop) == (given["block_size"], given["early_stop"])


def test_the_decoder_by_default_and_the_one_that_speed_is_set_against() -> None:
    families = {kind: loaded(kind)[1] for kind in ("llada", "dream", "block_diffusion", "causal")}
    assert {kind: default_decoder(family) for kind, family in families.items()} == {
        "llada": "d3llm", "dream": "d3llm", "block_diffusion": "fast-dllm-v2", "causal": "autoregressive",
    }  # fmt: skip
    for kind, family in families.items():
        assert plain_decoder(family).settings().get("confidence_threshold", 1.0) == 1.0
        plain = plain_decoder(family).override(**({"block_size": 8} if kind == "block_diffusion" else {}))
        (done,) = decode_all(engine_for(kind, plain), [Request([5, 6, 7], 16, ignore_eos=True)])
        assert len(done.token_ids) == 16
        # One token a forward; Dream's schedule of 16 steps has one that reveals nothing, which is not run.
        assert len(set(done.reveal_steps)) == (15 if kind == "dream" else 16)


def figures(**given: Any) -> TokenStatistics:
    return TokenStatistics(**{name: given.get(name) for name in TokenStatistics.__dataclass_fields__})


def test_the_settings_of_vanilla_decoding_act() -> None:
    """Each alone changes what is revealed first; `alg_temp` and "random" draw by seed and forward."""
    request = Request([5, 6], 12)

    def first(seed: int = 0, forward: int = 1, **settings: Any) -> list[int]:
        chosen = decoder("vanilla", block_size=12, **settings)
        canvas = request.canvas(chosen, loaded("llada")[1], 160)
        canvas.forwards = forward
        opening = chosen.schedule.open(canvas)
        rising = np.linspace(0.1, 0.9, 12, dtype=np.float32)
        found = figures(
            confidence=rising, logprob=np.log(rising), filtered_confidence=rising[::-1], margin=np.roll(rising, 1),
            filtered_entropy=np.roll(rising, 3), sampled=np.where(np.arange(12) == 11, EOS, 7),
        )  # fmt: skip
        revealed, _ = chosen.selection.select(canvas, opening, found, engine.family_rules(loaded("llada")[1]), seed)
        return np.flatnonzero(revealed).tolist()

    assert first() == [11]
    assert first(steps=4) == [9, 10, 11] and first(steps=4, defer_stops=True) == [8, 9, 10]
    assert first(remasking="maskgit_plus") == [0]
    assert first(remasking="topk_margin") == [0]
    assert first(remasking="entropy") == [3]
    assert first(remasking="maskgit_plus", steps=3) == [0, 1, 2]  # of 12 masks 1 - s / t, from t = 1 to s = 0.667
    assert first(remasking="maskgit_plus", steps=3, eps=0.9) == [*range(12)]  # nothing, nothing, then all
    for settings in ({"remasking": "random"}, {"remasking": "maskgit_plus", "alg_temp": 5.0}, {"remasking": "origin"}):
        drawn = [first(seed, forward, **settings) for seed in range(4) for forward in range(1, 5)]
        assert len({tuple(rows) for rows in drawn[:4]}) > 1 or settings["remasking"] == "origin"  # forwards
        assert len({tuple(rows) for rows in drawn[::4]}) > 1  # seeds
