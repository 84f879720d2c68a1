"""The canvas of one sequence: prompt, masks, reveals, early stop."""

from __future__ import annotations

from .answer import Answer, Conventions, Guess, read_row
from .network import Rows


def cut(size: int, block_size: int) -> list[tuple[int, int]]:
    """Blocks [start, end) of response positions; the last may be shorter."""
    return [(start, min(start + block_size, size)) for start in range(0, size, block_size)]


class Canvas:
    """Prompt and response of one sequence. Positions are response-relative; `ids` is the whole sequence."""

    def __init__(self, prompt_ids: list[int], size: int, conventions: Conventions, limit: int | None) -> None:
        if conventions.mask_id is None:
            raise ValueError("conventions.mask_id: None, but a canvas is made of masks")
        self.conventions = conventions
        self.prompt = len(prompt_ids)
        self.size = size
        self.limit = size if limit is None else limit
        self.ids = [*prompt_ids, *[conventions.mask_id] * size]
        self.reveal_steps: list[int | None] = [None] * size
        self.forwards = 0

    @property
    def length(self) -> int:
        """Absolute end of the canvas."""
        return self.prompt + self.size

    def masked(self, start: int, end: int) -> list[int]:
        return [position for position in range(start, end) if self.reveal_steps[position] is None]

    def finished(self) -> bool:
        return not self.masked(0, self.limit)

    def guesses(self, rows: Rows, positions: list[int]) -> dict[int, Guess]:
        """Read the row that predicts each response position: its own, or the one before in a shifted family."""
        shift = int(self.conventions.shift)
        return {position: read_row(rows[self.prompt + position - shift], self.conventions) for position in positions}

    def reveal(self, position: int, token: int) -> None:
        """Commit a token of the latest forward."""
        self.ids[self.prompt + position] = token
        self.reveal_steps[position] = self.forwards - 1

    def first_stop(self) -> int | None:
        for position in range(self.size):
            token = self.ids[self.prompt + position]
            if self.reveal_steps[position] is not None and token in self.conventions.stop_ids:
                return position
        return None

    def stop_early(self) -> None:
        """Everything behind the first stop token becomes eos; what was masked counts as revealed now."""
        stop = self.first_stop()
        if stop is None:
            return
        for position in range(stop + 1, self.size):
            self.ids[self.prompt + position] = self.conventions.eos_id
            if self.reveal_steps[position] is None:
                self.reveal_steps[position] = self.forwards - 1

    def answer(self) -> Answer:
        steps: list[int] = []
        for step in self.reveal_steps[: self.limit]:
            if step is None:
                break
            steps.append(step)
        return Answer(self.ids[self.prompt : self.prompt + len(steps)], self.forwards, steps)
