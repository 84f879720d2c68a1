"""What a decoder is made of: the contracts of its schedule, selection and caching, and what passes between them.

In every forward of a request the schedule opens masked positions, the caching says which window is computed, and from
the statistics of the opened positions the selection chooses what is revealed. Parts are frozen dataclasses whose fields
are the decoder's settings; all state is the canvas's.
"""

from __future__ import annotations

from dataclasses import Field
from typing import Any, ClassVar, NamedTuple, Protocol

from d3llm_ray.decoding.canvas import BoolArray, Canvas, IntArray
from d3llm_ray.decoding.rules import FamilyRules
from d3llm_ray.decoding.statistics import TokenStatistics
from d3llm_ray.models import BlockCausal


class Opening(NamedTuple):
    """What may be decoded in one forward, in response positions.

    `start` and `end` bound the block, sub-block or blocks that `eligible` (rising) lies in; `start` is negative where a
    block begins in the prompt. `boundary`: the one eligible position is predicted by the row before its block.
    """

    eligible: IntArray
    start: int
    end: int
    boundary: bool = False


class Window(NamedTuple):
    """One row of a forward, in absolute positions: compute [start, end), attend to keys [0, key_length)."""

    start: int
    end: int
    key_length: int
    pattern: BlockCausal | None = None


class Selected(NamedTuple):
    """Flags over the eligible positions: what is revealed, and what takes the most probable token whatever the
    temperature (None: nothing does)."""

    revealed: BoolArray
    forced: BoolArray | None = None


class Part(Protocol):
    """A dataclass whose fields are settings."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


class Schedule(Part, Protocol):
    """Which blocks may be decoded now."""

    @property
    def growing(self) -> bool:
        """Whether the canvas ends with the last created block, so that a stop token ends it."""

    @property
    def aligned(self) -> bool:
        """Whether blocks end at absolute multiples of the block size."""

    @property
    def initial_blocks(self) -> int:
        """Blocks created before the first forward."""

    @property
    def fixed_block_size(self) -> int | None:
        """The one block size that makes sense, if there is only one."""

    def open(self, canvas: Canvas) -> Opening:
        """Advance the block states before a forward, and say what it may decode."""


class Selection(Part, Protocol):
    """Which eligible masked positions are revealed by a forward."""

    @property
    def needs_margins(self) -> bool:
        """Whether `select` reads `TokenStatistics.margin`."""

    def select(
        self, canvas: Canvas, opening: Opening, statistics: TokenStatistics, rules: FamilyRules, seed: int
    ) -> Selected:
        """Choose among the eligible positions, of which `statistics` has one row each; at least one is revealed."""


class Caching(Part, Protocol):
    """Which positions a forward computes, and whose keys and values stay frozen."""

    @property
    def uses_cache(self) -> bool:
        """Whether keys and values are kept between forwards: the request then has a span of the KV pool."""

    def window(self, canvas: Canvas, opening: Opening, rules: FamilyRules) -> Window:
        """The positions to compute in the forward that has just been counted.

        Moves `canvas.cached` to what is frozen once this forward has run.
        """
