"""Several blocks at once: creation and activation (algorithms.md 6.2, 9.1-9.2), and d3LLM's selection."""

from __future__ import annotations

from .answer import Guess, lowest_entropy
from .canvas import Canvas, cut


class Blocks:
    """State of the response's blocks; block -1 is the prompt, always finished."""

    def __init__(self, canvas: Canvas, block_size: int, created: int) -> None:
        self.canvas = canvas
        self.bounds = cut(canvas.size, block_size)
        self.created = created
        self.activated: set[int] = set()

    def masked(self, block: int) -> list[int]:
        return [] if block < 0 else self.canvas.masked(*self.bounds[block])

    def progress(self, block: int) -> float:
        if block < 0:
            return 1.0
        start, end = self.bounds[block]
        return 1 - len(self.masked(block)) / (end - start)

    def advance(self, block_add_threshold: float, decoded_token_threshold: float, *, may_add: bool) -> None:
        """Before a forward: create at most one block, then activate the created ones that may be."""
        if may_add and self.created < len(self.bounds) and self.progress(self.created - 1) >= block_add_threshold:
            self.created += 1
        for block in range(self.created):
            if self.progress(block - 1) >= decoded_token_threshold:
                self.activated.add(block)

    def end(self) -> int:
        """Response position at which the created blocks end."""
        return self.bounds[self.created - 1][1] if self.created else 0

    def end_of_block_at(self, position: int) -> int:
        for start, end in self.bounds:
            if start <= position < end:
                return end
        raise IndexError(position)


def select_certain(canvas: Canvas, blocks: Blocks, guesses: dict[int, Guess], entropy_threshold: float) -> list[int]:
    """d3LLM's selection over the pooled masked positions of created blocks (algorithms.md 9.2, 7-8)."""
    strict = canvas.conventions.dream_rules
    chosen = {position for position, guess in guesses.items() if guess.is_certain(entropy_threshold, strict=strict)}
    if not strict:
        chosen.add(lowest_entropy(guesses))
    for block in sorted(blocks.activated):
        masked = blocks.masked(block)
        if masked:
            if not chosen.intersection(masked):
                chosen.add(lowest_entropy({position: guesses[position] for position in masked}))
            break
    return sorted(chosen)
