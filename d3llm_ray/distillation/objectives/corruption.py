"""What a student sees of an answer: which positions are masked, and which of them it has to predict.

d3LLM: one window, masked in the order in which the teacher revealed it; before the window the answer is clean, after
it everything is masked and nothing is supervised; view A masks what the teacher revealed last, view B the rest of the
window (arXiv:2601.07568, section 3). D2F and Fast-dLLM v2: every block at a ratio of its own. Pure numpy; positions
are relative to the start of the response.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

MaskOrder = Literal["trajectory", "reversed", "inverted", "shuffled", "random"]
RatioRounding = Literal["exact", "published"]
Ratio = TypeVar("Ratio", float, NDArray[np.float64])

RANDOM_MASK_EPSILON = 1e-3  # the i.i.d. baseline masks with p = (1 - eps) r + eps (LLaDA, arXiv:2502.09992)


@dataclass(frozen=True)
class TrainingWindow:
    """One draw for one sample: response positions [start, end) are trained at mask ratio `ratio`."""

    start: int
    end: int
    ratio: float


@dataclass(frozen=True)
class Views:
    """Response positions to predict: `masked` in view A, `complement` in view B; together the whole window."""

    window: TrainingWindow
    masked: NDArray[np.int64]
    complement: NDArray[np.int64]


@dataclass(frozen=True)
class Draws:
    """Random numbers of one sample, the same on whichever worker draws them: of an epoch, and of all epochs."""

    epoch: np.random.Generator
    lasting: np.random.Generator


def draws(seed: int, epoch: int, prompt_id: str) -> Draws:
    """Fresh generators for (seed, epoch, prompt_id) and (seed, prompt_id)."""
    return Draws(_generator(f"{seed}/{epoch}/{prompt_id}"), _generator(f"{seed}//{prompt_id}"))


def _generator(key: str) -> np.random.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def draw_window(
    rng: np.random.Generator, length: int, size: int, noise_floor: float, noise_max: float, canvas: int | None = None
) -> TrainingWindow:
    """Choose one of the windows of an answer of `length` tokens, and r ~ U(floor, max).

    There are `length // size + 1`, as in the published trainer: the last one begins with what `size` leaves over of the
    answer and ends with the `canvas` (None: with the answer). None is empty.
    """
    canvas = length if canvas is None else canvas
    last = min(length // size, (canvas - 1) // size)
    number = int(rng.integers(last + 1))
    ratio = noise_floor + (noise_max - noise_floor) * float(rng.random())
    return TrainingWindow(number * size, canvas if number == last else (number + 1) * size, ratio)


def choose_views(
    rng: np.random.Generator,
    reveal_step: NDArray[np.integer] | None,
    window: TrainingWindow,
    *,
    order: MaskOrder = "trajectory",
    rounding: RatioRounding = "exact",
    inverted_pairs: float = 0.0,
    order_rng: np.random.Generator | None = None,
) -> Views:
    """Split a window's positions between a view and its complementary view.

    `reveal_step`: [response length], 0-based teacher steps.

    `rounding="exact"`: exactly `round(ratio * window)` positions, at least 1, are masked, the last ones of an order:
    the teacher's by (reveal step, position), or for comparison that order "reversed", with the share `inverted_pairs`
    of all pairs "inverted", or "shuffled"; the last two draw from `order_rng`, which a caller seeds by the sample, so
    that a sample keeps its order. `rounding="published"` masks what was hidden after the teacher's step
    `start + int((1 - ratio) * window)`, as the published trainer does: about one position fewer, and sometimes none.
    `order="random"` masks independently, the baseline without trajectories, and needs no `reveal_step`.
    """
    positions = np.arange(window.start, window.end)
    hidden = np.zeros(positions.size, dtype=bool)
    if order == "random":
        hidden = rng.random(positions.size) < at_least_epsilon(window.ratio)
        if not hidden.any():
            hidden[rng.integers(positions.size)] = True
        return Views(window, positions[hidden], positions[~hidden])
    assert reveal_step is not None, "rows without an order train with order: random"
    if rounding == "published":
        entry = window.start + int((1 - window.ratio) * positions.size)
        hidden = reveal_step[positions] > min(entry, int(reveal_step.max()))
    else:
        count = max(1, round(window.ratio * positions.size))
        by_reveal = np.argsort(reveal_step[positions], kind="stable")
        if order == "reversed":
            by_reveal = by_reveal[::-1]
        elif order != "trajectory":
            assert order_rng is not None
            shuffled = order == "shuffled"
            by_reveal = order_rng.permutation(by_reveal) if shuffled else invert(by_reveal, inverted_pairs, order_rng)
        hidden[by_reveal[positions.size - count :]] = True
    return Views(window, positions[hidden], positions[~hidden])


def invert(order: NDArray[np.int64], share: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """`order` with exactly `round(share * pairs)` of its pairs the wrong way round (its Kendall tau distance).

    Neighbours that are still the right way round are swapped at random, each swap inverting one pair.
    """
    places = np.arange(order.size)
    wanted = round(share * order.size * (order.size - 1) / 2)
    for _ in range(wanted):
        ascents = np.flatnonzero(places[:-1] < places[1:])
        at = int(rng.choice(ascents))
        places[[at, at + 1]] = places[[at + 1, at]]
    return order[places]


def at_least_epsilon(ratio: Ratio) -> Ratio:
    """Mask probability of a drawn ratio in [0, 1]: never 0 (LLaDA, arXiv:2502.09992)."""
    return (1 - RANDOM_MASK_EPSILON) * ratio + RANDOM_MASK_EPSILON


def monotone_ratios(rng: np.random.Generator, blocks: int, low: float, high: float) -> NDArray[np.float64]:
    """Mask ratio of each of a response's blocks, [blocks], never falling (D2F, arXiv:2508.09192, section 3.2).

    The first is uniform in [low, high]; every later block adds up to an equal share of what is left to `high`.
    """
    first = rng.uniform(low, high)
    rises = rng.random(blocks - 1) * (high - first) / max(1, blocks - 1)
    return first + np.concatenate(([0.0], np.cumsum(rises)))


def block_ratios(rng: np.random.Generator, blocks: int) -> NDArray[np.float64]:
    """Mask ratio of each block, [blocks], uniform and independent (Fast-dLLM v2, arXiv:2509.26328, section 3.1)."""
    return at_least_epsilon(rng.random(blocks))


def mask_blocks(
    rng: np.random.Generator, block_of: NDArray[np.int64], ratios: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Mask every position independently at its block's ratio, [response length]; at least one position is masked."""
    masked: NDArray[np.bool_] = rng.random(block_of.size) < ratios[block_of]
    if not masked.any():
        masked[rng.integers(masked.size)] = True
    return masked


def corrupted(
    response_ids: NDArray[np.int32], masked: NDArray[Any], mask_token_id: int, end: int | None = None
) -> NDArray[np.int32]:
    """The response as a view's input: `masked` (positions or flags) and everything from `end` on is the mask token."""
    view = response_ids.copy()
    view[masked] = mask_token_id
    if end is not None:
        view[end:] = mask_token_id
    return view
