"""Likelihoods against enumerations and the literal reading of LLaDA's evaluation, on small models of every family."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from math import comb
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from d3llm_ray.decoding import DiffusionLLM, Request, decoder
from d3llm_ray.errors import DecodingError, InputError
from d3llm_ray.harness import scoring
from d3llm_ray.harness.masks import mask_counts, maskings
from d3llm_ray.harness.scoring import Likelihood, LikelihoodScorer, ScoredText
from d3llm_ray.models import Family
from tests.decoding.models import CONTEXT, MASK, decode_all, engine_for, loaded
from tests.reference.network import Network, everything

PROMPT = [5, 9, 14, 3, 22]
ONE_A_FORWARD = {  # Dream's vanilla reveals two in its last forward; with no entropy below 0 only the lowest one is
    "llada": decoder("vanilla", block_size=10),
    "dream": decoder("dparallel", block_size=10, entropy_threshold=0.0),
    "causal": decoder("autoregressive"),
}


def llm_of(kind: str) -> DiffusionLLM:
    model, family, _, _ = loaded(kind)
    preset = {"causal": "autoregressive", "block_diffusion": "fast-dllm-v2"}.get(kind, "vanilla")
    return DiffusionLLM(model, family, None, engine_for(kind, decoder(preset)))


def scored(llm: DiffusionLLM, texts: Sequence[ScoredText], **options: int) -> list[Likelihood]:
    found = dict(LikelihoodScorer(llm, **options).score(texts))
    return [found[number] for number in range(len(texts))]


def masked_logprob(network: Network, family: Family, ids: list[int], masked: Sequence[int]) -> float:
    """Sum of the log probabilities of the masked positions given the others, by a dense network."""
    mask = cast(int, family.mask_token_id)
    noisy = [mask if position in masked else token for position, token in enumerate(ids)]
    rows = network.forward(noisy, 0, len(ids), network.store(), everything)
    total = 0.0
    for position in masked:
        logits = rows[position - int(family.logit_shift)].double()
        logits[mask] = -torch.inf
        total += float(logits.log_softmax(dim=-1)[ids[position]])
    return total


def enumerated(network: Network, family: Family, text: ScoredText) -> float:
    """LLaDA's bound in full: numbers of masked tokens are equally likely, and so are the maskings of each."""
    ids, length = [*text.context, *text.target], len(text.target)
    places = range(len(text.context), len(ids))
    total = 0.0
    for count in range(1, length + 1):
        for masked in combinations(places, count):
            total += length / count * masked_logprob(network, family, ids, masked) / comb(length, count) / length
    return total


# --- what is masked


@pytest.mark.parametrize("length, samples", [(1, 4), (3, 2), (5, 8), (12, 128), (40, 128), (128, 128), (300, 7)])
def test_numbers_of_masked_tokens_are_those_of_the_published_code(length: int, samples: int) -> None:
    """algorithms.md 3.2: evenly spaced from a random start, wrapped to [1, target_len]."""
    for start in {1, 2, length // 2 + 1, length}:
        spaced = torch.linspace(start, start + (samples - 1) * (length / samples), steps=samples, dtype=torch.float64)
        literal = ((torch.round(spaced).long() - 1) % length + 1).numpy()
        clear = ((spaced - spaced.floor()) - 0.5).abs().numpy() > 1e-6  # halves are rounded to even there
        assert (mask_counts(length, samples, start) == literal)[clear].all()


@pytest.mark.parametrize("length, samples", [(3, 2), (5, 8), (12, 128), (7, 4)])
def test_every_number_of_masked_tokens_is_equally_likely(length: int, samples: int) -> None:
    by_sample = np.stack([mask_counts(length, samples, start) for start in range(1, length + 1)])
    for column in by_sample.T:
        assert sorted(column.tolist()) == list(range(1, length + 1))


@pytest.mark.parametrize("length, samples", [(8, 128), (6, 16), (40, 32)])
def test_maskings_have_the_numbers_and_count_what_they_should(length: int, samples: int) -> None:
    generator = np.random.default_rng(3)
    start = int(np.random.default_rng(3).integers(1, length + 1))
    masked, weights = maskings(length, samples, generator)
    counts = masked.sum(axis=1)
    drawn = Counter(mask_counts(length, samples, start).tolist())
    assert len({row.tobytes() for row in masked}) == len(masked)
    for count, number in drawn.items():
        assert weights[counts == count].sum() == pytest.approx(number * length / count / samples)


def test_short_targets_are_enumerated() -> None:
    masked, weights = maskings(7, 128, np.random.default_rng(0))
    assert len(masked) == 127 and len({row.tobytes() for row in masked}) == 127
    again, _ = maskings(7, 127, np.random.default_rng(1))
    assert (again == masked).all()
    assert (weights * masked.sum(axis=1)).sum() == pytest.approx(7.0)  # each token counts once
    assert len(maskings(7, 126, np.random.default_rng(0))[0]) < 127
    assert maskings(1, 1, np.random.default_rng(0))[1].tolist() == [1.0]


def test_the_estimate_is_unbiased() -> None:
    """Its mean over seeds is the enumeration's, within four standard errors, and stratifying makes it no worse."""
    length, samples, seeds = 6, 9, 4000
    values = np.random.default_rng(1).normal(size=2**length)  # any function of the masking

    def value_of(masked: np.ndarray) -> np.ndarray:
        return values[(masked << np.arange(length)).sum(axis=1)]

    everything_masked, weights = maskings(length, 2**length, np.random.default_rng(0))
    exact = float(weights @ value_of(everything_masked))
    estimates, plain = [], []
    for seed in range(seeds):
        generator = np.random.default_rng(seed)
        masked, weights = maskings(length, samples, generator)
        estimates.append(float(weights @ value_of(masked)))
        counts = generator.integers(1, length + 1, size=samples)
        ranks = generator.permuted(np.tile(np.arange(length), (samples, 1)), axis=1)
        plain.append(float((length / counts * value_of(ranks < counts[:, None])).mean()))
    assert abs(np.mean(estimates) - exact) < 4 * np.std(estimates) / np.sqrt(seeds)
    assert np.std(estimates) < np.std(plain)


# --- masked-diffusion models


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_a_short_target_has_its_enumerated_likelihood(kind: str) -> None:
    _, family, network, _ = loaded(kind)
    texts = [ScoredText(PROMPT, [7, 30, 7, 1]), ScoredText([4], [12]), ScoredText(PROMPT[:2], [33, 8])]
    for text, found in zip(texts, scored(llm_of(kind), texts), strict=True):
        assert found.logprob == pytest.approx(enumerated(network, family, text), abs=1e-3)


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_a_long_target_is_estimated_from_its_maskings(kind: str) -> None:
    _, family, network, _ = loaded(kind)
    text = ScoredText(PROMPT, [7, 30, 7, 1, 2, 19, 28, 11])
    ids = [*text.context, *text.target]
    masked, weights = maskings(8, 5, np.random.default_rng([4, *ids]))
    literal = sum(
        weight * masked_logprob(network, family, ids, (5 + np.flatnonzero(row)).tolist())
        for row, weight in zip(masked, weights, strict=True)
    )
    (found,) = scored(llm_of(kind), [text], samples=5, seed=4)
    assert found.logprob == pytest.approx(literal, abs=1e-3)
    assert scored(llm_of(kind), [text], samples=5, seed=5)[0].logprob != found.logprob


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_the_golden_logits_are_what_is_summed(golden: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """With everything masked, another token at one position changes the sum by the two tokens' gap in the logits."""
    given = json.loads((golden / f"{kind}_given.json").read_text())["logits"][0]
    llm = DiffusionLLM.from_pretrained(golden / f"tiny_{kind}")
    mask, shift = llm.family.mask_token_id, int(llm.family.logit_shift)
    first = given["input_ids"].index(mask)
    target = [5] * (len(given["input_ids"]) - first)
    everything_masked = np.ones((1, len(target)), dtype=np.bool_)
    monkeypatch.setattr(scoring, "maskings", lambda *_: (everything_masked, np.ones(1)))
    tried = 0
    for row, logits in zip(given["rows"], given["raw_logits" if shift else "logits"], strict=True):
        place = row + shift - first
        if place < 0:
            continue
        likeliest = int(np.argmax([-np.inf if token == mask else logit for token, logit in enumerate(logits)]))
        other = [*target[:place], likeliest, *target[place + 1 :]]
        texts = [ScoredText(given["input_ids"][:first], ids) for ids in (target, other)]
        plain, changed = scored(llm, texts)
        assert changed.logprob - plain.logprob == pytest.approx(logits[likeliest] - logits[5], abs=1e-3)
        tried += 1
    assert tried >= 2


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_golden_answers_are_scored_as_enumerated(golden: Path, kind: str) -> None:
    llm = DiffusionLLM.from_pretrained(golden / f"tiny_{kind}")
    case = json.loads((golden / f"{kind}_given.json").read_text())["decode"][0]
    text = ScoredText(case["prompt_ids"], case["response_ids"][:4])
    (found,) = scored(llm, [text])
    assert found.logprob == pytest.approx(enumerated(Network(llm.model), llm.family, text), abs=1e-3)


@pytest.mark.parametrize("kind", ["llada", "dream", "causal"])
def test_greedy_is_what_one_token_a_forward_decodes(kind: str) -> None:
    llm = llm_of(kind)
    preset = ONE_A_FORWARD[kind]
    requests = [Request(PROMPT[:size], 10, decoder=preset, ignore_eos=True) for size in (1, 3, 5)]
    done = decode_all(engine_for(kind, preset), requests)
    assert [one.forwards for one in done] == [10] * 3
    answers = [one.response_ids[:10] for one in done]
    texts = [ScoredText(request.prompt_ids, answer) for request, answer in zip(requests, answers, strict=True)]
    assert [found.greedy for found in scored(llm, texts, samples=2)] == [True] * 3
    for place in (0, 4, 9):
        others = [
            ScoredText(text.context, [*text.target[:place], text.target[place] % 30 + 2, *text.target[place + 1 :]])
            for text in texts
        ]
        assert [found.greedy for found in scored(llm, others, samples=2)] == [False] * 3


@pytest.mark.parametrize("kind", ["llada", "dream", "causal"])
def test_likelihoods_do_not_depend_on_the_batch(kind: str) -> None:
    generator = np.random.default_rng(2)
    texts = [
        ScoredText(generator.integers(2, 34, size=size).tolist(), generator.integers(2, 34, size=size + 2).tolist())
        for size in (1, 9, 4, 2, 7)
    ]
    together = scored(llm_of(kind), texts, samples=12, batch_size=32)
    for options in ({"batch_size": 1}, {"batch_size": 3}):
        apart = scored(llm_of(kind), texts, samples=12, **options)
        assert [found.logprob for found in apart] == pytest.approx([found.logprob for found in together], abs=1e-3)
        assert [found.greedy for found in apart] == [found.greedy for found in together]
    alone = [scored(llm_of(kind), [text], samples=12)[0].logprob for text in texts]
    assert alone == pytest.approx([found.logprob for found in together], abs=1e-3)


# --- causal models, and what is refused


def test_a_causal_model_is_scored_by_teacher_forcing() -> None:
    _, _, network, _ = loaded("causal")
    texts = [ScoredText(PROMPT, [7, 30, 7, 1]), ScoredText([4], [12]), ScoredText([3, 3], [1, 2, 3])]
    for text, found in zip(texts, scored(llm_of("causal"), texts), strict=True):
        ids = [*text.context, *text.target]
        rows = network.forward(ids, 0, len(ids), network.store(), lambda query, key: key <= query)
        places = range(len(text.context), len(ids))
        expected = sum(float(rows[place - 1].log_softmax(dim=-1)[ids[place]]) for place in places)
        assert found.logprob == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind, longest", [("llada", CONTEXT), ("causal", CONTEXT + 1)])
def test_the_longest_text_is_scored_and_a_longer_one_is_not(kind: str, longest: int) -> None:
    llm = llm_of(kind)
    assert LikelihoodScorer(llm).most_tokens == longest
    assert scored(llm, [ScoredText([3] * (longest - 1), [4])])[0].logprob < 0
    with pytest.raises(InputError, match=rf"texts\[1\]: got '{longest + 1} tokens'; accepted: at most {longest}"):
        scored(llm, [ScoredText([3], [4]), ScoredText([3] * longest, [4])])


def test_what_cannot_be_scored_is_refused() -> None:
    llm = llm_of("llada")
    with pytest.raises(InputError, match=r"texts\[0\]: context: got 'no tokens'"):
        scored(llm, [ScoredText([], [4])])
    with pytest.raises(InputError, match=r"texts\[0\]: target: got 'no tokens'"):
        scored(llm, [ScoredText([4], [])])
    for text in (ScoredText([MASK], [4]), ScoredText([4], [4, MASK])):
        with pytest.raises(InputError, match=f"the mask token {MASK}"):
            scored(llm, [text])
    with pytest.raises(InputError, match="loglikelihood: the model has block-causal attention; accepted: models with"):
        scored(llm_of("block_diffusion"), [ScoredText([3], [4])])


def test_logits_that_are_not_finite_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of("causal")
    monkeypatch.setattr(llm.model, "logits", lambda hidden: torch.full((hidden.shape[0], 37), torch.nan))
    with pytest.raises(DecodingError, match=r"texts\[0\]: the model's logits are NaN or infinite"):
        scored(llm, [ScoredText([3], [4])])
