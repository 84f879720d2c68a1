"""Sampling rules of scored rows: noise keyed by (seed, position, forward), and Dream's top-p and top-k filters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d3llm_ray.decoding.canvas import BoolArray, FloatArray, IntArray

GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment and its two multipliers
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
_POSITION_SALT = np.uint64(0xD1B54A32D192ED03)  # keeps `uniforms` apart from the noise of tokens


@dataclass(frozen=True)
class Sampling:
    """How each scored row is sampled: host arrays with one entry a row."""

    temperatures: FloatArray  # 0: the most probable token
    top_ps: FloatArray  # 1: off
    top_ks: IntArray  # 0: off
    keys: NDArray[np.uint64]  # from `row_keys`

    @cached_property
    def filtered(self) -> BoolArray:
        """Rows with a top-p or top-k filter."""
        return (self.top_ps < 1) | (self.top_ks > 0)

    @cached_property
    def active(self) -> BoolArray:
        """Rows whose sampling distribution is not softmax(logits)."""
        return self.filtered | (self.temperatures > 0)

    def select(self, rows: slice | IntArray) -> Sampling:
        """The entries of some rows."""
        return Sampling(self.temperatures[rows], self.top_ps[rows], self.top_ks[rows], self.keys[rows])


def row_keys(seed: int, positions: IntArray, forward: int) -> NDArray[np.uint64]:
    """64-bit keys of (seed, position, forward): sampling depends on nothing else, so not on the batch."""
    key = _mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF))
    key = _mix(key ^ np.uint64(forward + 1))
    return _mix(key ^ (positions.astype(np.uint64) + np.uint64(1)))


def uniforms(seed: int, positions: IntArray, forward: int) -> NDArray[np.float64]:
    """Uniform numbers in (0, 1), one a position, independent of the noise that draws its token."""
    bits = _mix(row_keys(seed, positions, forward) ^ _POSITION_SALT) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52  # 52 bits: exact, so that 1 is never reached


def gumbel_noise(keys: Tensor, vocabulary: int) -> Tensor:
    """Gumbel noise [N, vocabulary] float64 from row keys [N] int64: SplitMix64 over the token id."""
    x = keys[:, None] + torch.arange(1, vocabulary + 1, device=keys.device) * _signed(GOLDEN)

    def shifted(bits: int) -> Tensor:  # logical shift: torch's >> keeps the sign
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ shifted(30)) * _signed(MIX_1)
    x = (x ^ shifted(27)) * _signed(MIX_2)
    x = x ^ shifted(31)
    uniform = (shifted(11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def filter_logits(logits: Tensor, top_ps: Tensor, top_ks: Tensor) -> Tensor:
    """[N, V] tempered logits with -inf at the tokens that top-p [N], then top-k [N], leave out.

    Top-p keeps the smallest set of most probable tokens whose probability reaches it, top-k so many of them; at
    least one token stays (Dream, generation_utils.py). Equal logits rank by token id, so exactly k tokens stay.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    rank = torch.arange(logits.shape[1], device=logits.device)
    top_ps = torch.where(top_ps < 1, top_ps, torch.inf)  # off is off: rounding may not drop the tail
    top_ks = torch.where(top_ks > 0, top_ks, logits.shape[1])
    kept = ((before < top_ps[:, None]) | (rank == 0)) & (rank < top_ks[:, None])
    return torch.empty_like(logits).scatter_(1, order, ordered.masked_fill(~kept, -torch.inf))


def _mix(x: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """SplitMix64's step (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        x = np.asarray(x + np.uint64(GOLDEN))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
        return np.asarray(x ^ (x >> np.uint64(31)))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
