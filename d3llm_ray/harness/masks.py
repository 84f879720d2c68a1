"""Which tokens of a target are masked, and by how much each masking counts: LLaDA's likelihood estimate.

The log-likelihood bound of a masked-diffusion model (LLaDA, arXiv:2502.09992, equation 6) is the mean, over numbers of
masked tokens l of 1..L and over the maskings with that number, of L / l times the log probability of the masked tokens
given the others. LLaDA's evaluation code takes `samples` maskings whose numbers are evenly spaced from a random start.
"""

from __future__ import annotations

from math import comb

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def mask_counts(length: int, samples: int, start: int) -> IntArray:
    """Numbers of masked tokens, [samples] in 1..length: evenly spaced from `start`, and wrapped.

    Steps are rounded before the start is added, so that over all starts every number is equally likely.
    """
    steps = (2 * length * np.arange(samples) + samples) // (2 * samples)
    return (start - 1 + steps) % length + 1


def maskings(
    length: int, samples: int, generator: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Maskings [M, length] and weights [M]; the estimate is the sum of weight times the masked tokens' log probability.

    Where there are no more than `samples` maskings in all, they are all of them, and the estimate is exact. Else
    `samples` are drawn, and those that were drawn more than once are one with their weights' sum.
    """
    if length < 63 and 2**length - 1 <= samples:
        masked = (np.arange(1, 2**length)[:, None] >> np.arange(length) & 1).astype(np.bool_)
        return masked, np.array([1 / (count * comb(length, count)) for count in masked.sum(axis=1).tolist()])
    counts = mask_counts(length, samples, int(generator.integers(1, length + 1)))
    ranks = generator.permuted(np.tile(np.arange(length), (samples, 1)), axis=1)
    masked, which = np.unique(ranks < counts[:, None], axis=0, return_inverse=True)
    weights = np.zeros(len(masked))
    np.add.at(weights, which.ravel(), length / counts / samples)
    return masked, weights
