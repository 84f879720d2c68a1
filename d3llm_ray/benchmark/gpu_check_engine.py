"""Static shapes and CUDA graphs against eager steps, token by token, and how far bfloat16 strays from float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from d3llm_ray.benchmark.gpu_check_base import Figures, Part, Target, Unavailable, expect
from d3llm_ray.benchmark.gpu_check_switches import static_shapes, switched
from d3llm_ray.benchmark.shapes import SHAPES, random_model
from d3llm_ray.benchmark.workload import synthetic_prompts
from d3llm_ray.decoding import PRESETS, Completion, Decoder, Engine, Request
from d3llm_ray.errors import InputError
from d3llm_ray.models import Family, ModelConfig, Transformer, encode_chat, load_model, load_tokenizer, read_configs
from d3llm_ray.models.families import read_family
from d3llm_ray.tasks import load_task

ZOO = ("tiny-llada", "tiny-dream", "tiny-fast-dllm-v2", "tiny-ar")
RANDOM = {"random-llada": "llada-8b", "random-dream": "dream-7b"}
SHARPER = 8.0  # times the LM head of random weights: flat logits tie up to rounding, which no two kernels share
RANDOM_TPF = 3.0  # which positions are surest is as close to a tie: random models reveal by script
_SIZES = {"hidden": 1024, "layers": 8, "heads": 16, "mlp": 2816, "vocabulary": 32768}
_TOY_SIZES = {"hidden": 64, "layers": 2, "heads": 4, "mlp": 128, "vocabulary": 512}


@dataclass(frozen=True)
class Subject:
    """A model to decode with, and prompts for it."""

    model: Transformer
    family: Family
    vocabulary: int
    prompts: list[list[int]]
    scripted: bool = False

    def decoders(self, quick: bool) -> list[Decoder]:
        """What `cached_decoders` says; random weights reveal by script."""
        chosen = cached_decoders(self.family, quick)
        return [decoder.scripted(RANDOM_TPF) for decoder in chosen] if self.scripted else list(chosen)

    def engine(self, chosen: Decoder, batch_size: int, *, static: bool) -> Engine:
        options: dict[str, Any] = {"max_batch_size": batch_size, "vocabulary_size": self.vocabulary}
        return Engine(self.model, self.family, chosen, kv_positions=4096, cuda_graphs=static, **options)


def parts(quick: bool) -> Iterator[Part]:
    names = ("tiny-llada", "random-llada") if quick else (*ZOO, *RANDOM)
    for name in names:
        checks = (("static", "static shapes against eager", False), ("graphs", "CUDA graphs against eager", True))
        for kind, section, capture in checks:
            yield Part(f"{kind}-{name}", section, 60.0, partial(check_static, name, capture))
    for name in names:
        yield Part(f"bfloat16-{name}", "bfloat16 beside float32 (report only)", 30.0, partial(compare_bfloat16, name))


def check_static(name: str, capture: bool, target: Target) -> Figures:
    """Every decoder with a cache, in batches of several sizes that requests join and leave: the same tokens."""
    if capture and not target.cuda:
        raise Unavailable("CUDA graphs need a CUDA device")
    chosen = subject(name, "float32", target)
    cases, different, shapes = 0, [], 0
    for decoder in chosen.decoders(target.quick):
        for batch_size in (2,) if target.quick else (1, 3, 8):
            cases += 1
            expected = churn(chosen.engine(decoder, batch_size, static=False), chosen.prompts)
            with switched(capture=capture):
                engine = chosen.engine(decoder, batch_size, static=True)
                answers = [churn(engine, chosen.prompts) for _ in range(2)]  # the second time all shapes are known
            if static_shapes(engine) == 0:
                different.append(f"{_label(decoder)}, batch {batch_size}: no step ran in a static shape")
            shapes += static_shapes(engine)
            for got in answers:
                unlike = [n for n, (a, b) in enumerate(zip(got, expected, strict=True)) if _tokens(a) != _tokens(b)]
                if unlike:
                    different.append(f"{_label(decoder)}, batch {batch_size}: requests {unlike}")
    figures = {"cases": cases, "different": different, "shapes": shapes}
    return expect(not different, f"tokens differ in {len(different)} runs: {different[:1]}", figures)


def compare_bfloat16(name: str, target: Target) -> Figures:
    """How many answers are the same in both precisions, and where the others part."""
    answers = []
    for dtype in ("float32", "bfloat16"):
        chosen = subject(name, dtype, target)
        decoder = chosen.decoders(quick=True)[0]
        answers.append(churn(chosen.engine(decoder, 8, static=False), chosen.prompts))
        del chosen
    firsts = []
    for exact, rounded in zip(*answers, strict=True):
        unlike = [n for n, (a, b) in enumerate(zip(exact.response_ids, rounded.response_ids, strict=True)) if a != b]
        firsts += unlike[:1]
    total = len(answers[0])
    first = min(firsts, default=None)
    return {"requests": total, "identical_percent": 100 * (total - len(firsts)) / total, "first_difference": first}


def subject(name: str, dtype: str, target: Target) -> Subject:
    """A zoo model with prompts of `arith`, or random weights of a published layout with random prompts."""
    count = 5 if target.quick else 12
    if name in RANDOM:
        config, family = _random_shape(SHAPES[RANDOM[name]], _TOY_SIZES if target.quick else _SIZES)
        model = random_model(config, torch.float32, target.device, seed=0)
        model.lm_head.weight.mul_(SHARPER)
        rng = np.random.default_rng(0)
        drawn = synthetic_prompts(family, config.vocab_size, count, 200, seed=0)
        prompts = [ids[: rng.integers(3, 20 if target.quick else 200)] for ids in drawn]
        return Subject(model.to(getattr(torch, dtype)), family, config.vocab_size, prompts, scripted=True)
    model, family = load_model(name, dtype, target.device)
    tokenizer = load_tokenizer(name, family)
    assert tokenizer is not None  # the zoo has one for every model
    problems = load_task("arith").problems("test", count)
    vocabulary = min(len(tokenizer), read_configs(name)[0].vocab_size)
    return Subject(model, family, vocabulary, [encode_chat(tokenizer, problem.messages) for problem in problems])


def _random_shape(published: dict[str, Any], sizes: dict[str, int]) -> tuple[ModelConfig, Family]:
    """A published layout in smaller sizes: as many keys as queries for LLaDA, a quarter for Dream."""
    hidden, layers, heads, mlp, vocabulary = sizes.values()
    special = {"mask_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    if published["model_type"] == "llada":
        shape = {"d_model": hidden, "n_layers": layers, "n_heads": heads, "mlp_hidden_size": mlp}
        shape["embedding_size"] = vocabulary
    else:
        shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
        shape |= {"num_key_value_heads": heads // 4, "intermediate_size": mlp, "vocab_size": vocabulary}
    return read_family({**published, **special, **shape}, {})


def cached_decoders(family: Family, quick: bool) -> Iterator[Decoder]:
    """Every preset that fits the family and keeps keys, in every suffix mode; quick: the family's last one only."""
    fitting = []
    for preset in PRESETS.values():
        try:
            preset.check(family)
        except InputError:
            continue
        if preset.caching.uses_cache:
            fitting.append(preset)
    for preset in fitting[-1:] if quick else fitting:
        modes = [{"suffix": mode} for mode in ("recompute", "cached", "none")]
        for mode in modes if "suffix" in preset.settings() and not quick else [{}]:
            yield preset.override(**mode)


def churn(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Completion]:
    """Decode a request a prompt, of several lengths: half of them join later, and a bystander is cancelled."""
    requests = [Request(ids, (48, 20, 33)[number % 3], seed=number) for number, ids in enumerate(prompts)]
    half = len(requests) // 2
    ids = [engine.submit(request) for request in requests[:half]]
    bystander, done, steps = engine.submit(Request(prompts[-1], 48)), {}, 0
    while engine.active or engine.waiting or steps <= 3:
        for event in engine.step():
            if event.error is not None:
                raise RuntimeError(event.error)
            if event.completion is not None:
                done[event.request_id] = event.completion
        steps += 1
        if steps == 3:
            engine.cancel(bystander)
            ids += [engine.submit(request) for request in requests[half:]]
    return [done[request_id] for request_id in ids]


def _tokens(completion: Completion) -> tuple[list[int], list[int], int]:
    return completion.response_ids, completion.reveal_steps, completion.forwards


def _label(decoder: Decoder) -> str:
    suffix = decoder.settings().get("suffix")
    return decoder.name if suffix is None else f"{decoder.name} ({suffix})"
