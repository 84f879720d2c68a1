"""Token statistics of scored rows: most probable token, sampled token, its probability, entropy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d3llm_ray.decoding.canvas import FloatArray, IntArray
from d3llm_ray.models import Transformer

MAX_CHUNK_ELEMENTS = 1 << 26  # float32 logits held at a time: 256 MiB
NEVER = -1e9  # logit of a token that must not be predicted; finite, so that 0 * NEVER stays 0
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class TokenStatistics:
    """Host arrays with one entry for each scored row."""

    argmax: IntArray
    sampled: IntArray  # equals argmax at temperature 0
    confidence: FloatArray  # probability of `sampled`, before temperature
    entropy: FloatArray  # nats, before temperature


def row_keys(seed: int, positions: IntArray, forward: int) -> NDArray[np.uint64]:
    """64-bit keys of (seed, position, forward): sampling depends on nothing else, so not on the batch."""
    key = _mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF))
    key = _mix(key ^ np.uint64(forward + 1))
    return _mix(key ^ (positions.astype(np.uint64) + np.uint64(1)))


def _mix(x: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """SplitMix64's step (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        x = np.asarray(x + np.uint64(_GOLDEN))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def gumbel_noise(keys: Tensor, vocabulary: int) -> Tensor:
    """Gumbel noise [N, vocabulary] float64 from row keys [N] int64: SplitMix64 over the token id."""
    x = keys[:, None] + torch.arange(1, vocabulary + 1, device=keys.device) * _signed(_GOLDEN)

    def shifted(bits: int) -> Tensor:  # logical shift: torch's >> keeps the sign
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ shifted(30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(27)) * _signed(0x94D049BB133111EB)
    x = x ^ shifted(31)
    uniform = (shifted(11).double() + 0.5) * 2.0**-53  # in (0, 1)
    return -torch.log(-torch.log(uniform))


def score(
    logits: Tensor, mask_id: int | None, temperatures: Tensor | None = None, keys: Tensor | None = None
) -> Tensor:
    """[N, V] logits -> [4, N] float32: argmax, sampled, probability of the sampled token, entropy in nats.

    The mask token is never predicted. With `temperatures` [N] and `keys` [N], tokens are sampled by the Gumbel-max
    rule in float64 (LLaDA generate.py; same distribution as Dream's multinomial); rows at temperature 0 take
    the argmax.
    """
    logits = logits.float()
    if mask_id is not None and mask_id < logits.shape[1]:
        logits[:, mask_id] = NEVER
    top, argmax = logits.max(dim=-1)
    shifted = logits - top[:, None]
    exponentials = shifted.exp()
    total = exponentials.sum(dim=-1)
    log_total = total.log()
    entropy = log_total - (exponentials * shifted).sum(dim=-1) / total
    sampled, log_probability = argmax, -log_total
    if temperatures is not None and keys is not None:
        hot = temperatures > 0
        noisy = logits.double() / temperatures.where(hot, torch.ones_like(temperatures)).double()[:, None]
        drawn = (noisy + gumbel_noise(keys, logits.shape[1])).argmax(dim=-1)
        sampled = torch.where(hot, drawn, argmax)
        log_probability = shifted.gather(1, sampled[:, None])[:, 0] - log_total
    # Token ids below 2^24 are exact in float32, so one tensor and one host copy carry everything.
    return torch.stack((argmax.float(), sampled.float(), log_probability.exp(), entropy))


def token_statistics(
    model: Transformer,
    hidden: Tensor,
    vocabulary: int,
    mask_id: int | None,
    temperatures: FloatArray,
    keys: NDArray[np.uint64],
) -> TokenStatistics:
    """LM head and statistics on the scored rows `hidden` [N, hidden_size] only, chunked; one host copy.

    Token ids from `vocabulary` on (rows of the LM head without a token) are never predicted.
    """
    sampling = bool((temperatures > 0).any())
    device = hidden.device
    hot = torch.from_numpy(temperatures).to(device) if sampling else None
    packed_keys = torch.from_numpy(keys.view(np.int64)).to(device) if sampling else None
    chunk = max(1, MAX_CHUNK_ELEMENTS // vocabulary)
    parts = []
    for begin in range(0, hidden.shape[0], chunk):
        rows = slice(begin, begin + chunk)
        logits = model.logits(hidden[rows])[:, :vocabulary]
        parts.append(
            score(
                logits,
                mask_id,
                hot[rows] if hot is not None else None,
                packed_keys[rows] if packed_keys is not None else None,
            )
        )
    argmax, sampled, confidence, entropy = torch.cat(parts, dim=1).cpu().numpy()
    return TokenStatistics(argmax.astype(np.int64), sampled.astype(np.int64), confidence, entropy)
