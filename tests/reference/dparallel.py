"""dParallel's decoding: sequential blocks, an entropy threshold (algorithms.md 7.2)."""

from __future__ import annotations

from .answer import Answer, Conventions, Guess, lowest_entropy
from .blockwise import decode_blocks
from .canvas import Canvas
from .network import Network


def decode(
    network: Network,
    prompt_ids: list[int],
    size: int,
    *,
    conventions: Conventions,
    limit: int | None = None,
    block_size: int = 32,
    entropy_threshold: float = 0.45,
    cache: str = "none",
    early_stop: bool = True,
    repeat_finished: bool = False,
) -> Answer:
    """`cache`: none, prefix or dual, as Fast-dLLM's."""

    def select(guesses: dict[int, Guess]) -> list[int]:
        best = lowest_entropy(guesses)
        strict = conventions.dream_rules
        chosen = [p for p, guess in guesses.items() if guess.is_certain(entropy_threshold, strict=strict)]
        if best in chosen or (strict and chosen):
            return chosen
        return [*chosen, best]

    return decode_blocks(
        network,
        Canvas(prompt_ids, size, conventions, limit),
        block_size=block_size,
        cache=cache,
        select=select,
        early_stop=early_stop,
        repeat_finished=repeat_finished,
    )
