"""The model `d3llm` by itself: arguments, tokens, templates, and requests as lm-eval hands them over."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from d3llm_ray.decoding import DiffusionLLM, WholePrompt, decoder
from d3llm_ray.errors import InputError
from d3llm_ray.harness.model import HarnessModel
from d3llm_ray.harness.scoring import LikelihoodScorer, ScoredText

QUESTIONS = ["3 + 4 ?", "Ann has 9 pens and loses 2. How many now?", "1 + 1 ?"]


class Asked(NamedTuple):
    """What the model reads of an lm-eval `Instance`."""

    args: tuple[Any, ...]


class Kept:
    """lm-eval's cache."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, Any, Any]] = []

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self.kept.append((kind, request, answer))


class AloneModel(HarnessModel):
    """Without lm-eval, which may not be here."""

    cache_hook = Kept()


def model_of(checkpoint: Path, **options: Any) -> AloneModel:
    return AloneModel(pretrained=str(checkpoint), **options)


def generated(model: HarnessModel, prompts: Sequence[str], **gen_kwargs: Any) -> list[str]:
    return model.generate_until([Asked((prompt, gen_kwargs)) for prompt in prompts], disable_tqdm=True)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> AloneModel:
    return model_of(tiny_checkpoint, mc_num=4)


@pytest.fixture(scope="module")
def offline(tiny_checkpoint: Path) -> DiffusionLLM:
    return DiffusionLLM.from_pretrained(tiny_checkpoint)


# --- arguments


def test_arguments_arrive(tiny_checkpoint: Path) -> None:
    model = model_of(
        tiny_checkpoint,
        decoder="dparallel",
        dtype="bfloat16",
        batch_size="7",
        mc_num=3,
        max_gen_toks=5,
        seed=9,
        entropy_threshold=0.25,
    )
    llm, scorer = model._llm, model._scorer
    assert llm.decoder() == decoder("dparallel", entropy_threshold=0.25)
    assert str(llm.model.embed_tokens.weight.dtype) == "torch.bfloat16"
    assert llm.engine.max_batch_size == scorer._batch_size == 7
    assert (scorer._samples, scorer._seed) == (3, 9)
    info = model.get_model_info()
    assert info["decoder_settings"]["entropy_threshold"] == 0.25 and info["decoder_settings"]["decoder"] == "dparallel"
    assert (info["mc_num"], info["seed"]) == (3, 9)
    assert len(model.tok_encode(generated(model, ["1 + 1 ?"])[0])) <= 5
    assert model.max_length == 256


@pytest.mark.parametrize("given", [None, "auto", "auto:4"])
def test_a_batch_size_that_nobody_knows(tiny_checkpoint: Path, given: str | None) -> None:
    assert model_of(tiny_checkpoint, batch_size=given, max_batch_size=64)._llm.engine.max_batch_size == 32


def test_one_request_after_the_other_is_said_to_be_slow(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model_of(tiny_checkpoint, batch_size=1)
    assert "--batch_size 32 is faster" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_gpu_that_lm_eval_assumes_is_not_needed(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert model_of(tiny_checkpoint, device="cuda:0")._llm.model.embed_tokens.weight.device.type == "cpu"
    assert "device cuda:0 is not here: cpu" in caplog.text


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pretrained": ""}, "pretrained: got ''; accepted: --model_args pretrained=NAME"),
        ({"pretrained": "nowhere"}, "model: unknown value 'nowhere'"),
        ({"batch_size": 0}, "batch_size: got 0; accepted: a positive whole number, or auto"),
        ({"batch_size": "many"}, "batch_size: got 'many'"),
        ({"mc_num": 0}, "mc_num: got 0; accepted: a whole number, 1 or more"),
        ({"mc_num": 1.5}, "mc_num"),
        ({"max_gen_toks": 0}, "max_gen_toks"),
        ({"seed": -1}, "seed: got -1; accepted: a whole number, 0 or more"),
        ({"decoder": "quick"}, "decoder: unknown value 'quick'"),
        ({"decoder": "autoregressive"}, "decoder: 'autoregressive' cannot decode"),
        ({"entropy_treshold": 1.0}, "entropy_treshold: no setting of decoder 'd3llm'; accepted: block_add_threshold"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_bad_arguments_are_refused(tiny_checkpoint: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        AloneModel(**{"pretrained": str(tiny_checkpoint), **options})
    assert words in str(caught.value)


def test_a_checkpoint_without_a_tokenizer_is_refused(golden: Path) -> None:
    with pytest.raises(InputError, match="tiny_llada has no tokenizer; accepted: a checkpoint with one"):
        model_of(golden / "tiny_llada")


# --- texts


def test_the_chat_template_is_the_models(model: AloneModel, offline: DiffusionLLM) -> None:
    messages = [{"role": "user", "content": QUESTIONS[1]}]
    prompt = model.apply_chat_template(messages)
    assert model.tok_encode(prompt) == offline.encode(messages)
    begun = [*messages, {"role": "assistant", "content": "Ann has"}]
    continued = model.apply_chat_template(begun, add_generation_prompt=False)
    assert continued == prompt + "Ann has"
    assert model.tokenizer_name and "/" not in model.tokenizer_name


def test_a_template_that_refuses_is_told(model: AloneModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ raise_exception('no system role') }}")
    with pytest.raises(InputError, match="messages: the model's chat template refuses them: no system role"):
        model.apply_chat_template([{"role": "system", "content": "x"}])


def test_an_empty_context_is_the_beginning_token(model: AloneModel, offline: DiffusionLLM) -> None:
    begin = model.tokenizer.bos_token_id
    assert model.prefix_token_id == (model.eot_token_id if begin is None else begin)
    (expected,) = offline.generate([[model.prefix_token_id]], max_tokens=8)
    assert generated(model, [""], max_gen_toks=8) == [expected.text]


# --- generate_until


def test_generations_are_the_offline_apis(model: AloneModel, offline: DiffusionLLM) -> None:
    expected = [output.text for output in offline.generate([WholePrompt(q) for q in QUESTIONS], max_tokens=32)]
    assert generated(model, QUESTIONS, max_gen_toks=32) == expected
    stop = next(text[5:8] for text in expected if len(text) > 8)
    cut = generated(model, QUESTIONS, until=[stop], max_gen_toks=32)
    assert cut == [text.split(stop)[0] for text in expected] != expected


def test_requests_that_are_generated_alike_are_one_call(model: AloneModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, dict[str, Any]]] = []
    generate = model._llm.generate

    def counted(prompts: Any, **options: Any) -> Any:
        calls.append((len(prompts), options))
        return generate(prompts, **options)

    monkeypatch.setattr(model._llm, "generate", counted)
    long, short = {"max_gen_toks": 24, "until": "\n"}, {"max_gen_toks": 4, "top_p": 0.5, "top_k": 3, "temperature": 1.0}
    asked = [Asked((q, kwargs)) for q, kwargs in zip(QUESTIONS, (long, short, long), strict=True)]
    mixed = model.generate_until(asked, disable_tqdm=True)
    assert [count for count, _ in calls] == [2, 1]
    assert calls[0][1]["stop"] == ("\n",) and calls[0][1]["max_tokens"] == 24
    assert [calls[1][1][name] for name in ("max_tokens", "top_p", "top_k", "temperature")] == [4, 0.5, 3, 1.0]
    assert mixed == [model.generate_until([one], disable_tqdm=True)[0] for one in asked]


def test_a_sampled_request_that_is_repeated_draws_again(model: AloneModel, offline: DiffusionLLM) -> None:
    prompts = [QUESTIONS[0]] * 3 + [QUESTIONS[1]]
    drawn = generated(model, prompts, max_gen_toks=16, temperature=1.0, do_sample=True)
    seeds = (0, 1, 2, 0)
    for prompt, seed, text in zip(prompts, seeds, drawn, strict=True):
        (expected,) = offline.generate([WholePrompt(prompt)], max_tokens=16, temperature=1.0, seed=seed)
        assert text == expected.text
    assert len(set(drawn[:3])) > 1
    assert len(set(generated(model, prompts[:3], max_gen_toks=16))) == 1


def test_a_long_context_loses_its_beginning(
    model: AloneModel, offline: DiffusionLLM, caplog: pytest.LogCaptureFixture
) -> None:
    ids = model.tok_encode(QUESTIONS[1] * 40)
    (expected,) = offline.generate([ids[-(256 - 32) :]], max_tokens=32)
    with caplog.at_level(logging.WARNING):
        assert generated(model, [QUESTIONS[1] * 40, QUESTIONS[0]], max_gen_toks=32)[0] == expected.text
    assert "1 of 2 contexts are cut to their last 224 tokens" in caplog.text
    with pytest.raises(InputError, match="max_tokens 256 exceed the model's context of 256"):
        generated(model, [QUESTIONS[0]], max_gen_toks=256)
    with pytest.raises(InputError, match="max_tokens: got 'few'"):
        generated(model, [QUESTIONS[0]], max_gen_toks="few")


# --- likelihoods


def test_likelihoods_are_the_scorers(model: AloneModel, offline: DiffusionLLM) -> None:
    pairs = [(model.tok_encode(QUESTIONS[0]), model.tok_encode(text)) for text in ("7", "12 pens", "1 + 1 = 2 .")]
    model.cache_hook.kept.clear()
    found = model._loglikelihood_tokens([((text, "x"), *text) for text in pairs], disable_tqdm=True)
    expected = dict(LikelihoodScorer(offline, samples=4).score([ScoredText(*pair) for pair in pairs]))
    assert found == [tuple(expected[number]) for number in range(3)]
    assert sorted(model.cache_hook.kept) == sorted(
        ("loglikelihood", (pair, "x"), one) for pair, one in zip(pairs, found, strict=True)
    )


def test_a_long_pair_loses_its_beginning(model: AloneModel, caplog: pytest.LogCaptureFixture) -> None:
    context, target = [5, 6, 7] * 90, [8, 9]
    with caplog.at_level(logging.WARNING):
        (found,) = model._loglikelihood_tokens([(None, context, target)], disable_tqdm=True)
    assert "1 of 1 contexts are cut to fit in 256 tokens" in caplog.text
    (short,) = model._loglikelihood_tokens([(None, context[-254:], target)], disable_tqdm=True)
    assert found == short
    with pytest.raises(InputError, match="accepted: at most 256, the model's context"):
        model._loglikelihood_tokens([(None, context, context)], disable_tqdm=True)


# --- the command line


def test_without_lm_eval_the_extra_is_named() -> None:
    hidden = "import sys; sys.modules['lm_eval'] = None; from d3llm_ray.harness.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and 'pip install "d3llm-ray[eval]"' in done.stderr
