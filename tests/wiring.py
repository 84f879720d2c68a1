"""What the tests of wiring share: what a run was seen to hand on, by a name for each place where it acts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from d3llm_ray.progress import Progress

Seen = defaultdict[Any, list[Any]]
Look = Callable[[Seen], Any]  # finds in it what became of a setting


def only(name: str) -> Look:
    """The one value that was seen, however often."""

    def look(seen: Seen) -> Any:
        first, *others = seen[name]
        assert all(other == first for other in others), (name, seen[name])
        return first

    return look


class Notes(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)
