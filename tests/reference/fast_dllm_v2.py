"""Fast-dLLM v2: block diffusion over absolute blocks with an autoregressive step between them (algorithms.md 5)."""

from __future__ import annotations

from .answer import Answer, Conventions, most_confident
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
    sub_block_size: int = 8,
    confidence_threshold: float = 0.9,
    block_cache: bool = True,
    early_stop: bool = False,
) -> Answer:
    """Rows are read as shifted whatever the conventions: an unshifted checkpoint is a ValueError."""
    if not conventions.shift:
        raise ValueError("conventions.shift: False, but Fast-dLLM v2 reads shifted logits")
    prompt = len(prompt_ids)
    extended = size + -(prompt + size) % block_size
    canvas = Canvas(prompt_ids, extended, conventions, size if limit is None else limit)
    store = network.store()

    def sees(query: int, key: int) -> bool:
        return key // block_size <= query // block_size

    def masked(start: int, end: int) -> list[int]:
        """Masked response positions of an absolute span."""
        return canvas.masked(max(start - prompt, 0), max(end - prompt, 0))

    def has_stop(start: int, end: int) -> bool:
        return any(token in conventions.stop_ids for token in canvas.ids[max(start, prompt) : end])

    exact = 0  # keys of [0, exact) are those of final tokens
    for start in range(prompt // block_size * block_size, canvas.length, block_size):
        end = start + block_size
        if canvas.finished() or (start > prompt and has_stop(start - block_size, start)):
            break
        if start >= prompt:  # boundary: compute what is final and let its last row predict the block's first token
            rows = network.forward(canvas.ids, exact, start, store, sees)
            canvas.forwards += 1
            exact = start
            first_position = start - prompt
            canvas.reveal(first_position, canvas.guesses(rows, [first_position])[first_position].token)
            if early_stop:
                canvas.stop_early()

        has_block_keys = False
        for sub_start in range(start, end, sub_block_size):
            sub_end = min(sub_start + sub_block_size, end)
            while not canvas.finished() and masked(sub_start, sub_end):
                first, last = start, end
                if block_cache and has_block_keys and sub_start not in {prompt + p for p in masked(start, end)}:
                    first, last = sub_start, sub_end
                if exact < start:  # the prompt's full blocks come with the first block's first forward
                    first = exact
                    exact = start
                rows = network.forward(canvas.ids, first, last, store, sees)
                canvas.forwards += 1
                has_block_keys = True
                guesses = canvas.guesses(rows, masked(sub_start, sub_end))
                best = most_confident(guesses)
                for position, guess in guesses.items():
                    if guess.confidence > confidence_threshold or position == best:
                        canvas.reveal(position, guess.token)
                if early_stop:
                    canvas.stop_early()
    return canvas.answer()
