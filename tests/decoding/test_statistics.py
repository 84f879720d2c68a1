"""Token statistics against float64, and sampling that depends on (seed, position, forward) alone."""

from __future__ import annotations

import numpy as np
import torch

from d3llm_ray.decoding.statistics import gumbel_noise, row_keys, score


def test_statistics_equal_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 300, generator=generator) * torch.logspace(-2, 2, 50)[:, None]
    argmax, sampled, confidence, entropy = score(logits.clone(), mask_id=7)
    wide = logits.double()
    wide[:, 7] = -torch.inf
    p = wide.softmax(-1)
    expected = -(p * wide.log_softmax(-1)).nan_to_num().sum(-1)
    torch.testing.assert_close(entropy.double(), expected, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(confidence.double(), p.max(-1).values, atol=1e-6, rtol=1e-5)
    assert torch.equal(argmax, sampled) and torch.equal(argmax.long(), p.argmax(-1))


def test_the_mask_is_never_predicted() -> None:
    logits = torch.zeros(1, 5)
    logits[0, 3] = 50.0
    argmax, _, confidence, entropy = score(logits, mask_id=3)
    assert argmax.item() != 3
    assert abs(confidence.item() - 0.25) < 1e-6 and abs(entropy.item() - np.log(4)) < 1e-6


def test_sampling_follows_the_tempered_distribution() -> None:
    """20,000 draws at temperature 2: frequencies within 4 standard errors of softmax(logits / 2)."""
    draws, logits = 20_000, torch.tensor([2.0, 0.0, -1.0, 1.0])
    keys = torch.from_numpy(row_keys(5, np.arange(draws), 3).view(np.int64))
    out = score(logits.repeat(draws, 1), None, torch.full((draws,), 2.0), keys)
    expected = (logits / 2).softmax(-1)
    frequency = torch.bincount(out[1].long(), minlength=4) / draws
    assert ((frequency - expected).abs() < 4 * (expected * (1 - expected) / draws).sqrt()).all()
    torch.testing.assert_close(out[2], logits.softmax(-1)[out[1].long()], atol=1e-6, rtol=1e-5)


def test_temperature_zero_rows_stay_greedy_in_a_mixed_batch() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    keys = torch.from_numpy(row_keys(0, np.arange(6), 1).view(np.int64))
    temperatures = torch.tensor([0.0, 5.0, 0.0, 5.0, 0.0, 5.0])
    out = score(logits.clone(), None, temperatures, keys)
    assert torch.equal(out[1][::2], logits.argmax(-1)[::2].float())


def test_keys_and_noise_depend_on_seed_position_and_forward_only() -> None:
    base = row_keys(3, np.array([4, 9]), 2)
    assert row_keys(3, np.array([9]), 2)[0] == base[1]
    others = [row_keys(4, np.array([4]), 2)[0], row_keys(3, np.array([5]), 2)[0], row_keys(3, np.array([4]), 3)[0]]
    assert len({int(base[0]), *map(int, others)}) == 4
    noise = gumbel_noise(torch.from_numpy(row_keys(0, np.arange(400), 1).view(np.int64)), 50)
    # Gumbel: mean 0.5772, variance pi^2 / 6; rows uncorrelated.
    assert abs(noise.mean().item() - 0.5772) < 0.03 and abs(noise.var().item() - 1.645) < 0.06
    assert torch.corrcoef(noise[:20]).fill_diagonal_(0).abs().max() < 0.65
