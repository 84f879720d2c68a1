"""Engine laws: batch invariance, joining and leaving, caches that change nothing, limits, seeds, events."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d3llm_ray.decoding import Completion, DiffusionLLM, Engine, Request, decoder
from d3llm_ray.errors import InputError
from d3llm_ray.models import Transformer, load_model, load_tokenizer, save_model
from d3llm_ray.models.families import read_family


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path):
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def dream():
    """Random weights in Dream's conventions: shifted logits, grouped heads, qkv bias."""
    shape, family = read_family(
        {
            "model_type": "Dream", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_theta": 1e4,
            "rms_norm_eps": 1e-6, "mask_token_id": 58, "eos_token_id": 59, "pad_token_id": 59,
        },
        {"block_size": 8},
    )  # fmt: skip
    torch.manual_seed(3)
    model = Transformer(shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval(), family


def _requests(count: int, seed: int = 0, vocabulary: int = 58, **settings) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            [rng.randrange(4, vocabulary) for _ in range(rng.randint(1, 40))],
            max_tokens=rng.randint(1, 48),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            seed=rng.randrange(1000),
            decoder=decoder("d3llm", **settings) if settings else None,
        )
        for _ in range(count)
    ]


def _run(engine: Engine, requests: list[Request]) -> list[Completion]:
    """Decode all, and check that the events add up to the answers."""
    ids = [engine.submit(request) for request in requests]
    done: dict[int, Completion] = {}
    deltas: dict[int, list[int]] = {}
    while engine.active or engine.waiting:
        for event in engine.step():
            deltas.setdefault(event.request_id, []).extend(event.token_ids)
            if event.completion is not None:
                assert deltas[event.request_id] == event.completion.token_ids
                done[event.request_id] = event.completion
    return [done[request_id] for request_id in ids]


@pytest.mark.parametrize("conventions", ["loaded", "dream"])
@pytest.mark.parametrize(
    "settings", [{"cache_delay": 10_000}, {"refresh_interval": 1}, {"refresh_interval": 1, "suffix": "cached"}]
)
def test_caches_that_never_freeze_or_always_refresh_change_nothing(conventions, settings, request) -> None:
    model, family = request.getfixturevalue(conventions)
    requests = _requests(12, seed=4)
    plain = _run(Engine(model, family, decoder("d3llm-nocache", entropy_threshold=1.0)), requests)
    cached = _run(Engine(model, family, decoder("d3llm", entropy_threshold=1.0, **settings)), requests)
    for one, other in zip(plain, cached, strict=True):
        assert one.response_ids == other.response_ids and one.forwards == other.forwards


@pytest.mark.parametrize("suffix", ["recompute", "cached", "none"])
@pytest.mark.parametrize("conventions", ["loaded", "dream"])
def test_every_forward_reveals_and_nothing_stays_masked(conventions, suffix, request) -> None:
    model, family = request.getfixturevalue(conventions)
    engine = Engine(model, family, decoder("d3llm", suffix=suffix, refresh_interval=5, early_stop=False))
    for completion in _run(engine, _requests(10, seed=6)):
        assert family.mask_token_id not in completion.response_ids[: max(1, len(completion.token_ids))]
        assert completion.forwards <= len(completion.response_ids)
        # Every forward but those cut off by max_tokens revealed something.
        assert set(range(completion.forwards)) == set(completion.reveal_steps) | {0}


def test_the_canvas_grows_with_the_longest_request_without_losing_frozen_keys(loaded) -> None:
    model, family = loaded
    requests = [Request([5] * 20, 48), Request([6] * 200, 48)]
    engine = Engine(model, family, decoder("d3llm"), max_batch_size=2)
    first = engine.submit(requests[0])
    engine.step()
    engine.step()
    second = engine.submit(requests[1])  # needs a larger cache while the first is under way
    done = {}
    while engine.active or engine.waiting:
        done.update({event.request_id: event.completion for event in engine.step() if event.completion})
    for request_id, request in ((first, requests[0]), (second, requests[1])):
        expected = _run(Engine(model, family, decoder("d3llm")), [request])[0]
        assert done[request_id].response_ids == expected.response_ids


def test_max_tokens_bounds_the_answer_and_rounds_the_canvas(loaded) -> None:
    model, family = loaded
    for limit, canvas in ((1, 16), (16, 16), (17, 32)):
        completion = _run(Engine(model, family, decoder("d3llm")), [Request([9, 9], limit)])[0]
        assert len(completion.response_ids) == canvas and len(completion.token_ids) <= limit
        assert completion.finish_reason in ("stop", "length")
    # Context 256: a prompt of 250 leaves 6 positions, less than a block.
    completion = _run(Engine(model, family, decoder("vanilla")), [Request([9] * 250, 6)])[0]
    assert len(completion.response_ids) == 6


def test_seeds(loaded) -> None:
    model, family = loaded
    make = lambda seed: Request([7, 8, 9], 32, temperature=1.0, seed=seed)  # noqa: E731
    same = _run(Engine(model, family, decoder("d3llm")), [make(1) for _ in range(5)])
    assert len({tuple(c.response_ids) for c in same}) == 1
    different = _run(Engine(model, family, decoder("d3llm")), [make(seed) for seed in range(10)])
    assert len({tuple(c.response_ids) for c in different}) >= 9


def test_cancel_frees_the_slot(loaded) -> None:
    model, family = loaded
    engine = Engine(model, family, decoder("vanilla"), max_batch_size=1)
    first, second = engine.submit(Request([5], 32)), engine.submit(Request([6], 16))
    engine.step()
    assert (engine.active, engine.waiting) == (1, 1)
    engine.cancel(first)
    engine.cancel(12345)
    assert (engine.active, engine.waiting) == (0, 1)
    finished = [event for _ in range(16) for event in engine.step() if event.completion]
    assert [event.request_id for event in finished] == [second] and engine.step() == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 8), "prompt"),
        (Request([5], 0), "max_tokens"),
        (Request([5], 8, temperature=-1.0), "temperature"),
        (Request([5], 8, temperature=float("nan")), "temperature"),
        (Request([5] * 250, 7), "context of 256"),
        (Request([100_000], 8), "prompt"),
        (Request([-1], 8), "prompt"),
        (Request([5, 2, 6], 8), "prompt: got 'the mask token 2 at position 1'; accepted: ids of a text"),
    ],
)
def test_bad_requests_are_named(loaded, request_: Request, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Engine(*loaded, decoder("d3llm")).submit(request_)


def test_a_causal_model_is_refused_with_the_reason() -> None:
    shape, family = read_family(
        {
            "model_type": "llama", "vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 32, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
            "eos_token_id": 1,
        },
        {},
    )  # fmt: skip
    with pytest.raises(InputError, match="causal"):
        Engine(Transformer(shape), family, decoder("d3llm"))


def test_offline_api(tiny_checkpoint: Path) -> None:
    llm = DiffusionLLM.from_pretrained(tiny_checkpoint, decoder="d3llm", entropy_threshold=0.2)
    question = "Tom has 5 apples. Tom buys 2 more. How many apples does Tom have now?"
    messages = [{"role": "user", "content": question}]
    by_text, by_messages, by_ids = llm.generate([question, messages, llm.encode(messages)], max_tokens=32)
    assert by_text == by_messages == by_ids
    assert by_text.text == load_tokenizer(tiny_checkpoint, llm.family).decode(
        by_text.token_ids, skip_special_tokens=True
    )
    assert by_text.tokens_per_forward == len(by_text.token_ids) / by_text.forwards
    everything = llm.generate([messages], max_tokens=32, entropy_threshold=1e6)[0]
    assert everything.forwards < by_text.forwards
    with pytest.raises(InputError, match="entropy_treshold"):
        llm.generate([messages], entropy_treshold=1.0)
    with pytest.raises(InputError, match=r"prompts\[1\].*context"):
        llm.generate([messages, [5] * 300])
    assert llm.engine.active == llm.engine.waiting == 0


def test_a_single_text_is_no_list_of_prompts(tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"prompts: got 'Tom has 5'; accepted: a list of prompts; .* \[text\]"):
        DiffusionLLM.from_pretrained(tiny_checkpoint).generate("Tom has 5")


def test_generate_hands_every_field_to_the_engine(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = DiffusionLLM.from_pretrained(tiny_checkpoint, decoder="d3llm", cache_delay=3)
    requests, submit = [], llm.engine.submit
    monkeypatch.setattr(llm.engine, "submit", lambda request: requests.append(request) or submit(request))
    fields = {"max_tokens": 9, "temperature": 0.4, "seed": 11, "top_p": 0.6, "top_k": 7, "ignore_eos": True}
    llm.generate([[5, 6]], stop_token_ids=[4, 8], refresh_interval=5, **fields)
    llm.generate([[5, 6]], decoder="vanilla", steps=3)
    (own, other) = requests
    chosen = decoder("d3llm", cache_delay=3, refresh_interval=5)
    assert own == Request([5, 6], decoder=chosen, stop_token_ids=[4, 8], **fields)
    assert other == Request([5, 6], decoder=decoder("vanilla", steps=3))


def test_ids_without_a_token_are_never_predicted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """An LM head with more rows than the tokenizer has tokens, the extra ones by far the most probable."""
    model, family = load_model(tiny_checkpoint)
    extra = 30
    config = {**family.config, "vocab_size": shape_of(model) + extra, "embedding_size": shape_of(model) + extra}
    shape, wide_family = read_family(config, family.generation_config)
    wide = Transformer(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide.get_parameter(name)[: parameter.shape[0]] = parameter
        wide.lm_head.weight[-extra:] = 100 * model.lm_head.weight[:extra]
    save_model(wide, wide_family, tmp_path / "wide")
    for file in tiny_checkpoint.glob("tokenizer*"):
        (tmp_path / "wide" / file.name).write_bytes(file.read_bytes())
    prompts = [[9, 10, 11], [20]]
    expected = DiffusionLLM.from_pretrained(tiny_checkpoint).generate(prompts, max_tokens=32)
    assert DiffusionLLM.from_pretrained(tmp_path / "wide").generate(prompts, max_tokens=32) == expected


def shape_of(model: Transformer) -> int:
    return model.config.vocab_size


def test_the_core_runs_on_a_bare_machine() -> None:
    """models/, decoding/ and tasks/ import nothing of Ray, HTTP, DeepSpeed or pydantic."""
    code = (
        "import json, sys, d3llm_ray.models, d3llm_ray.decoding, d3llm_ray.tasks;"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"ray", "deepspeed", "fastapi", "pydantic", "optuna", "matplotlib"} & set(loaded)
