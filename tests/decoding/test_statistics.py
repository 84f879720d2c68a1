"""Token statistics in plain torch against float64; filters; noise that depends on (seed, position, forward) alone."""

from __future__ import annotations

from dataclasses import astuple, fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d3llm_ray.decoding import statistics
from d3llm_ray.decoding.sampling import Sampling, filter_logits, gumbel_noise, row_keys, uniforms
from d3llm_ray.decoding.statistics import TokenStatistics, token_statistics
from tests.decoding.near_certain import near_certain


class Head:
    """A model whose hidden rows are its logits; counts the rows it is asked for."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def logits(self, hidden: Tensor) -> Tensor:
        self.calls.append(len(hidden))
        return hidden.clone()


def sampled_as(rows: int, temperature: Any = 0.0, top_p: Any = 1.0, top_k: Any = 0, seed: int = 0) -> Sampling:
    return Sampling(
        np.broadcast_to(np.float32(temperature), rows).copy(),
        np.broadcast_to(np.float32(top_p), rows).copy(),
        np.broadcast_to(np.int64(top_k), rows).copy(),
        row_keys(seed, np.arange(rows), 1),
    )


def measure(logits: Tensor, sampling: Sampling | None = None, **options: Any) -> TokenStatistics:
    options = {"vocabulary": logits.shape[1], "mask_id": None, **options}
    return token_statistics(Head(), logits, sampling=sampling or sampled_as(len(logits)), **options)  # type: ignore[arg-type]


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def literal_filter(logits: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """Probabilities of one float64 row after top-p, then top-k: one token after another."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept: list[int] = []
    for token in order:
        if kept and (top_p < 1 and sum(p[kept]) >= top_p):
            break
        kept.append(token)
    kept = kept[:top_k] if top_k else kept
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


def entropy_of(p: np.ndarray) -> float:
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def test_statistics_equal_float64() -> None:
    logits = random_logits(50, 300) * torch.logspace(-2, 2, 50)[:, None]
    found = measure(logits, mask_id=7, margins=True)
    wide = logits.double()
    wide[:, 7] = -torch.inf
    p = wide.softmax(-1)
    top = p.topk(2).values
    expected = -(p * wide.log_softmax(-1)).nan_to_num().sum(-1)
    np.testing.assert_allclose(found.entropy, expected, atol=5e-6, rtol=1e-5)
    np.testing.assert_allclose(found.confidence, top[:, 0], atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(found.logprob, top[:, 0].log(), atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(found.margin, top[:, 0] - top[:, 1], atol=1e-6)
    np.testing.assert_array_equal(found.argmax, p.argmax(-1))
    np.testing.assert_array_equal(found.sampled, found.argmax)
    np.testing.assert_array_equal(found.filtered_confidence, found.confidence)
    np.testing.assert_array_equal(found.filtered_entropy, found.entropy)
    assert found.finite.all()


def test_near_certain_tokens_keep_their_order() -> None:
    logits, logprob, entropy = near_certain()
    assert len(set(np.exp(logprob).astype(np.float32))) < 7  # ties for whoever compares probabilities
    for sampling in (None, sampled_as(12, 1e-3)):
        found = measure(logits, sampling)
        np.testing.assert_array_equal(np.argsort(-found.logprob), np.argsort(-logprob))
        np.testing.assert_array_equal(np.argsort(found.entropy), np.argsort(entropy))
        np.testing.assert_allclose(found.logprob, logprob, rtol=1e-5)
        np.testing.assert_allclose(found.entropy, entropy, rtol=1e-5)


def test_dtypes_and_no_rows() -> None:
    for found in (
        measure(random_logits(3, 8)),
        measure(random_logits(3, 8), sampled_as(3, 1.0)),
        measure(torch.ones(0, 8)),
    ):
        *arrays, tops = astuple(found)
        assert [array.dtype.name for array in arrays] == ["int64", "int64", *["float32"] * 6, "bool"]
        assert len({array.shape for array in arrays}) == 1
        assert tops.shape == (*arrays[0].shape, 0)


def test_the_mask_and_ids_without_a_token_are_never_predicted() -> None:
    logits = torch.zeros(1, 7)
    logits[0, 3], logits[0, 5:] = 50.0, 90.0
    for temperature in (0.0, 1.0, 1e9, 3e38):  # at 1e9 a large negative logit would be an ordinary one
        found = measure(logits.repeat(300, 1), sampled_as(300, temperature), vocabulary=5, mask_id=3)
        assert set(found.sampled) <= {0, 1, 2, 4} and set(found.argmax) == {0}
        np.testing.assert_allclose(found.confidence, 0.25, atol=1e-6)
        np.testing.assert_allclose(found.filtered_entropy, np.log(4), atol=1e-6)
    outside = measure(random_logits(4, 6), mask_id=6)
    np.testing.assert_array_equal(outside.argmax, random_logits(4, 6).argmax(-1))


def test_margins_are_nan_unless_asked_for() -> None:
    assert np.isnan(measure(random_logits(3, 9)).margin).all()
    assert not np.isnan(measure(random_logits(3, 9), margins=True).margin).any()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_that_is_not_finite_is_flagged_and_harms_no_neighbour(broken: float, temperature: float) -> None:
    logits = random_logits(5, 40)
    sampling = sampled_as(5, temperature, top_p=0.9)
    sound = measure(logits, sampling, vocabulary=39, mask_id=4, margins=True)
    logits[2, 11] = broken
    logits[:, 4] = logits[:, 39] = broken  # the mask and what lies beyond the vocabulary are not looked at
    found = measure(logits, sampling, vocabulary=39, mask_id=4, margins=True)
    assert found.finite.tolist() == [True, True, False, True, True] and sound.finite.all()
    assert 0 <= found.sampled[2] < 39 and 0 <= found.argmax[2] < 39
    for before, after in zip(astuple(sound), astuple(found), strict=True):
        np.testing.assert_array_equal(np.delete(before, 2, axis=0), np.delete(after, 2, axis=0))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]),
    top_p=st.one_of(st.just(1.0), st.floats(0.0, 1.0, width=32)),
    top_k=st.one_of(st.just(0), st.integers(1, 40)),
)
def test_filtered_statistics_equal_a_literal_float64_filter(
    seed: int, temperature: float, top_p: float, top_k: int
) -> None:
    logits = random_logits(4, 30, seed)
    found = measure(logits, sampled_as(4, temperature, top_p, top_k, seed), mask_id=2, margins=True)
    wide = logits.double().numpy().copy()
    wide[:, 2] = -np.inf
    for row, values in enumerate(wide):
        p = literal_filter(values / float(np.float32(temperature or 1.0)), float(np.float32(top_p)), top_k)
        token, order = found.sampled[row], np.sort(p)
        assert p[token] > 0 and (temperature > 0 or token == values.argmax())
        plain = values - np.log(np.exp(values).sum())
        np.testing.assert_allclose(found.filtered_confidence[row], p[token], rtol=1e-5)
        np.testing.assert_allclose(found.margin[row], order[-1] - order[-2], atol=1e-6)
        np.testing.assert_allclose(found.filtered_entropy[row], entropy_of(p), atol=1e-5)
        np.testing.assert_allclose(found.logprob[row], plain[token], atol=1e-5)
        np.testing.assert_allclose(found.confidence[row], np.exp(plain[token]), atol=1e-6)


def test_filters_that_are_off_change_nothing() -> None:
    logits = random_logits(6, 50).double()
    logits[0, 7] = 60.0  # the others' probabilities vanish beside 1
    off = filter_logits(logits, torch.ones(6), torch.zeros(6, dtype=torch.int64))
    assert torch.equal(off, logits)


def test_equal_logits_are_kept_by_token_id() -> None:
    kept = filter_logits(torch.zeros(2, 6), torch.tensor([1.0, 0.5]), torch.tensor([2, 0])).isfinite()
    assert kept.tolist() == [[True] * 2 + [False] * 4, [True] * 3 + [False] * 3]


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(2.0, 1.0, 0), (1.0, 0.75, 0), (1.5, 1.0, 3), (2.0, 0.9, 2)]
)
def test_sampling_follows_the_filtered_distribution(temperature: float, top_p: float, top_k: int) -> None:
    """20,000 draws: frequencies within 4 standard errors of the filtered softmax; nothing outside of it."""
    draws, logits = 20_000, torch.tensor([2.0, 0.0, -1.0, 1.0, 0.5])
    found = measure(logits.repeat(draws, 1), sampled_as(draws, temperature, top_p, top_k, seed=5))
    expected = literal_filter(logits.double().numpy() / temperature, top_p, top_k)
    frequency = np.bincount(found.sampled, minlength=5) / draws
    assert (np.abs(frequency - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws)).all()
    np.testing.assert_allclose(found.confidence, logits.softmax(-1)[found.sampled], rtol=1e-5)


def test_what_a_row_returns_does_not_depend_on_its_neighbours() -> None:
    rows = 12
    logits = random_logits(rows, 60)
    sampling = sampled_as(rows, [0, 0.5, 1.0] * 4, [1.0, 1.0, 0.8, 0.8] * 3, [0, 0, 0, 0, 5, 5] * 2)
    together = measure(logits, sampling, mask_id=1, margins=True)
    np.testing.assert_array_equal(together.sampled[::3], together.argmax[::3])
    for row in range(rows):
        alone = measure(logits[[row]], sampling.select(np.array([row])), mask_id=1, margins=True)
        assert together.sampled[row] == alone.sampled[0]
        for name in (field.name for field in fields(TokenStatistics)):
            np.testing.assert_allclose(getattr(together, name)[row], getattr(alone, name)[0], rtol=1e-5, atol=1e-6)


def test_chunks_change_nothing_and_bound_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(30, 20)
    guidance = (random_logits(30, 20, seed=1), np.linspace(0, 2, 30, dtype=np.float32))
    sampling = sampled_as(30, [0, 0.9] * 15, [1.0, 1.0, 0.7] * 10)
    whole = measure(logits, sampling, guidance=guidance, margins=True)
    monkeypatch.setattr(statistics, "MAX_CHUNK_ELEMENTS", 20 * 4 * statistics.COSTLY_ROW)
    head = Head()
    parts = token_statistics(
        head,  # type: ignore[arg-type]
        logits,
        vocabulary=20,
        mask_id=None,
        sampling=sampling,
        guidance=guidance,
        margins=True,
    )
    assert max(head.calls) <= 4
    for one, other in zip(astuple(whole), astuple(parts), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_guidance_mixes_logits_where_its_scale_is_positive() -> None:
    conditional, unconditional = random_logits(4, 30), random_logits(4, 30, seed=1)
    scales = np.array([0.0, 0.5, 2.0, 0.0], dtype=np.float32)
    mixed = unconditional + (torch.from_numpy(scales)[:, None] + 1) * (conditional - unconditional)
    mixed[[0, 3]] = conditional[[0, 3]]
    unconditional[3] = torch.nan  # not looked at
    found = measure(conditional, guidance=(unconditional, scales), margins=True)
    for one, other in zip(astuple(found), astuple(measure(mixed, margins=True)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_greedy_rows_cost_no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("drew a token")

    monkeypatch.setattr(statistics, "draw", refuse)
    measure(random_logits(4, 20))


def test_sampled_tokens_are_those_of_the_noise() -> None:
    logits, sampling = random_logits(40, 70), sampled_as(40, 0.6, seed=9)
    noise = gumbel_noise(torch.from_numpy(sampling.keys.view(np.int64)), 70)
    expected = (logits.double() / torch.tensor(0.6).double() + noise).argmax(-1)
    np.testing.assert_array_equal(measure(logits, sampling).sampled, expected)


def test_keys_noise_and_uniforms_stay_what_they_are() -> None:
    """Pinned: a change would silently change what every seed samples."""
    positions = np.array([0, 5, 1000])
    keys = row_keys(7, positions, 3)
    assert keys.tolist() == [3256092245380512898, 15700885654698859165, 13271581988031045849]
    assert gumbel_noise(torch.from_numpy(keys.view(np.int64)), 50).argmax(-1).tolist() == [48, 33, 19]
    np.testing.assert_allclose(
        uniforms(7, positions, 3), [0.34468028066318734, 0.27138019464495244, 0.8262573638335572]
    )


def test_keys_and_noise_depend_on_seed_position_and_forward_only() -> None:
    base = row_keys(3, np.array([4, 9]), 2)
    assert row_keys(3, np.array([9]), 2)[0] == base[1]
    others = [row_keys(4, np.array([4]), 2)[0], row_keys(3, np.array([5]), 2)[0], row_keys(3, np.array([4]), 3)[0]]
    assert len({int(base[0]), *map(int, others)}) == 4
    noise = gumbel_noise(torch.from_numpy(row_keys(0, np.arange(400), 1).view(np.int64)), 50)
    # Gumbel: mean 0.5772, variance pi^2 / 6; rows uncorrelated.
    assert abs(noise.mean().item() - 0.5772) < 0.03 and abs(noise.var().item() - 1.645) < 0.06
    assert torch.corrcoef(noise[:20]).fill_diagonal_(0).abs().max() < 0.65


def test_uniforms_are_uniform_and_independent_of_the_noise() -> None:
    count = 20_000
    drawn = uniforms(1, np.arange(count), 4)
    assert drawn.dtype == np.float64 and drawn.min() > 0 and drawn.max() < 1
    # Kolmogorov-Smirnov distance, 1.95 / sqrt(n) at the 0.1 % level.
    assert np.abs(np.sort(drawn) - (np.arange(count) + 0.5) / count).max() < 1.95 / np.sqrt(count)
    noise = gumbel_noise(torch.from_numpy(row_keys(1, np.arange(count), 4).view(np.int64)), 3).numpy()
    correlations = np.corrcoef(np.vstack([drawn[None], drawn[None] ** 2, noise.T]))[:2, 2:]
    assert np.abs(correlations).max() < 4 / np.sqrt(count)
    assert uniforms(1, np.array([17]), 4)[0] == drawn[17]
    assert (
        len({drawn[17], *(uniforms(seed, np.array([p]), f)[0] for seed, p, f in [(2, 17, 4), (1, 18, 4), (1, 17, 5)])})
        == 4
    )


@pytest.mark.parametrize("hot", [False, True])
def test_most_probable_tokens_leave_the_mask_out(hot: bool) -> None:
    """Neither the mask nor ids without a token are among them, and the mask takes no probability from others."""
    logits = random_logits(6, 40)
    logits[:, 7], logits[:, 30:] = 50.0, 60.0
    sampling = sampled_as(6, temperature=1.0, top_k=3) if hot else None
    found = measure(logits.clone(), sampling, vocabulary=30, mask_id=7, tops=4)
    expected = logits[:, :30].double().index_fill(1, torch.tensor([7]), -torch.inf).log_softmax(-1).topk(4)
    told = found.most_probable(np.arange(6), 4)
    assert [[token for token, _ in row] for row in told] == expected.indices.tolist()
    np.testing.assert_allclose([[logprob for _, logprob in row] for row in told], expected.values, atol=1e-6)
    assert measure(logits.clone(), sampling, vocabulary=30, mask_id=7).tops.shape == (6, 0)
