"""What a student sees of an answer: one window, masked in the order in which the teacher revealed it.

All positions are relative to the start of the response. Before the window the answer is clean, after it everything
is masked and nothing is supervised; inside it, view A masks what the teacher revealed last and view B the rest
(arXiv:2601.07568, section 3; pure numpy).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

MaskOrder = Literal["trajectory", "random"]
RatioRounding = Literal["exact", "published"]

RANDOM_MASK_EPSILON = 1e-3  # the i.i.d. baseline masks with p = (1 - eps) r + eps (LLaDA, arXiv:2502.09992)


@dataclass(frozen=True)
class Window:
    """One draw for one sample: response positions [start, end) are trained at mask ratio `ratio`."""

    start: int
    end: int
    ratio: float


@dataclass(frozen=True)
class Views:
    """Response positions to predict: `masked` in view A, `complement` in view B; together the whole window."""

    window: Window
    masked: NDArray[np.int64]
    complement: NDArray[np.int64]


def generator(seed: int, epoch: int, prompt_id: str) -> np.random.Generator:
    """Random draws of one sample in one epoch, the same on whichever worker they are made."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{prompt_id}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def draw_window(rng: np.random.Generator, length: int, size: int, noise_floor: float, noise_max: float) -> Window:
    """Choose one of the `ceil(length / size)` windows of a response of `length` tokens, and r ~ U(floor, max).

    The last window is shorter where `size` does not divide `length`; none is empty.
    """
    start = size * int(rng.integers(-(-length // size)))
    ratio = noise_floor + (noise_max - noise_floor) * float(rng.random())
    return Window(start, min(start + size, length), ratio)


def choose_views(
    rng: np.random.Generator,
    reveal_step: NDArray[np.integer],
    window: Window,
    *,
    order: MaskOrder = "trajectory",
    rounding: RatioRounding = "exact",
) -> Views:
    """Split a window's positions between the two views. `reveal_step`: [response length], 0-based teacher steps.

    `order="trajectory"`, `rounding="exact"`: exactly `round(ratio * window)` positions, at least 1, are masked: the
    ones that the teacher revealed last, by (reveal step, position). `rounding="published"` masks what was hidden
    after the teacher's step `start + int((1 - ratio) * window)`, as the published trainer does: about one position
    fewer, and sometimes none. `order="random"` masks independently, the baseline without trajectories.
    """
    positions = np.arange(window.start, window.end)
    if order == "random":
        p = (1 - RANDOM_MASK_EPSILON) * window.ratio + RANDOM_MASK_EPSILON
        hidden = rng.random(positions.size) < p
        if not hidden.any():
            hidden[rng.integers(positions.size)] = True
    elif rounding == "published":
        entry = window.start + int((1 - window.ratio) * positions.size)
        hidden = reveal_step[positions] > min(entry, int(reveal_step.max()))
    else:
        count = max(1, round(window.ratio * positions.size))
        by_reveal = np.argsort(reveal_step[positions], kind="stable")
        hidden = np.zeros(positions.size, dtype=bool)
        hidden[by_reveal[positions.size - count :]] = True
    return Views(window, positions[hidden], positions[~hidden])


def corrupted(
    response_ids: NDArray[np.int32], window: Window, masked: NDArray[np.int64], mask_token_id: int
) -> NDArray[np.int32]:
    """The response as a view's input: `masked` and everything after the window hold the mask token."""
    view = response_ids.copy()
    view[masked] = mask_token_id
    view[window.end :] = mask_token_id
    return view
