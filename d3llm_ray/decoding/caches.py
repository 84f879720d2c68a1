"""Caching: which positions a forward computes, and whose keys and values stay frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from d3llm_ray.decoding.canvas import Canvas
from d3llm_ray.decoding.rules import FamilyRules
from d3llm_ray.errors import require, unknown

Suffix = Literal["recompute", "cached", "none"]


@dataclass(frozen=True)
class Window:
    """One row of a forward, in absolute positions: compute [start, end), attend to keys [0, key_length)."""

    start: int
    end: int
    key_length: int


@dataclass(frozen=True)
class NoCache:
    """Every forward computes the whole canvas."""

    uses_cache = False

    def window(self, canvas: Canvas, active_end: int, rules: FamilyRules) -> Window:
        """The positions to compute in the forward that has just been counted."""
        return Window(0, canvas.length, canvas.length)


@dataclass(frozen=True)
class DelayedCache:
    """d3LLM's cache with delay and refresh (section 4.2).

    A finished block (the prompt is the first) waits `cache_delay` forwards before its keys and values are
    frozen, and meanwhile every forward is a full one; with nothing waiting, every `refresh_interval`-th
    forward is full too. Other forwards start behind the frozen part. `suffix` says what happens to the masks
    behind the active blocks: "recompute" as published, "cached" (keys of the last full forward), or "none".
    """

    cache_delay: int = 1
    refresh_interval: int = 10000
    suffix: Suffix = "recompute"
    uses_cache = True

    def __post_init__(self) -> None:
        for field in ("cache_delay", "refresh_interval"):
            value = getattr(self, field)
            require(isinstance(value, int) and value >= 1, field, value, "a whole number of forwards, 1 or more")
        if self.suffix not in get_args(Suffix):
            raise unknown("suffix", self.suffix, get_args(Suffix))

    def window(self, canvas: Canvas, active_end: int, rules: FamilyRules) -> Window:
        """As `NoCache.window`; moves `canvas.cached` to what is frozen once this forward has run."""
        frozen, waiting = self._walk(canvas, rules)
        end = canvas.length if self.suffix == "recompute" else canvas.prompt_length + active_end
        key_length = end if self.suffix == "none" else canvas.length
        start, canvas.cached = canvas.cached, max(canvas.cached, frozen)
        due = canvas.forwards % self.refresh_interval == 0
        refresh = frozen <= start and (waiting or due)
        if start == 0 or refresh:
            # Full: also what fills the suffix's keys for "cached".
            return Window(0, key_length, key_length)
        return Window(start, end, key_length)

    def _walk(self, canvas: Canvas, rules: FamilyRules) -> tuple[int, bool]:
        """Stamp finished spans in order. Returns the end of what may be frozen now, and whether a span waits."""
        frozen, waiting = canvas.cached, False
        ends = [canvas.prompt_length, *(canvas.prompt_length + int(end) for end in canvas.ends[: canvas.created])]
        for index, end in enumerate(ends):
            if end <= canvas.cached:
                continue
            if index > 0 and canvas.mask_counts[index - 1]:
                break
            stamp = canvas.finished_at.setdefault(end, 0 if index == 0 else canvas.forwards)
            if canvas.forwards - stamp >= self.cache_delay:
                frozen = end
                continue
            waiting = True
            if rules.serial_stabilising:
                break  # the next block's clock starts only once this one is frozen
        return frozen, waiting


Caching = NoCache | DelayedCache
