"""What goes in and comes out of every reference: conventions, the answer, and what one logits row says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conventions:
    """A checkpoint's rules. `shift`: row p - 1 predicts position p. Ids from `vocabulary` on are never predicted."""

    mask_id: int | None
    eos_id: int
    stop_ids: tuple[int, ...]
    shift: bool
    dream_rules: bool
    vocabulary: int


@dataclass(frozen=True)
class Answer:
    """`response_ids` up to the limit, or to the first position that a growing decoder never created.

    `reveal_steps[r]` is the 0-based forward that revealed response position r.
    """

    response_ids: list[int]
    forwards: int
    reveal_steps: list[int]


@dataclass(frozen=True)
class Guess:
    """A logits row's candidate (lowest id on ties), its probability, the gap to the next, the entropy in nats."""

    token: int
    confidence: float
    gap: float
    entropy: float

    def is_certain(self, threshold: float, *, strict: bool) -> bool:
        """Below an entropy threshold; Dream's rules are strict, LLaDA's let equality pass."""
        return self.entropy < threshold if strict else self.entropy <= threshold


def read_row(row: Tensor, conventions: Conventions) -> Guess:
    """Candidate and statistics of one logits row [vocab_size], in float32."""
    row = row.clone()
    row[conventions.vocabulary :] = -1e9
    if conventions.mask_id is not None:
        row[conventions.mask_id] = -1e9
    token = int((row == row.max()).nonzero()[0])
    log_probabilities = torch.log_softmax(row, dim=-1)
    probabilities = log_probabilities.exp()
    first, second = probabilities.topk(2).values.tolist()
    return Guess(
        token=token,
        confidence=first,
        gap=first - second,
        entropy=-float((probabilities * log_probabilities).sum()),
    )


def highest(scores: Mapping[int, float], count: int) -> list[int]:
    """The `count` positions of highest score; the lowest position first on ties."""
    return sorted(scores, key=lambda position: (-scores[position], position))[:count]


def lowest_entropy(guesses: Mapping[int, Guess]) -> int:
    return min(guesses, key=lambda position: (guesses[position].entropy, position))


def most_confident(guesses: Mapping[int, Guess]) -> int:
    return min(guesses, key=lambda position: (-guesses[position].confidence, position))
