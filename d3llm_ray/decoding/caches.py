"""Caching: which positions a forward computes, and whose keys and values stay frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from d3llm_ray.decoding.canvas import Canvas
from d3llm_ray.decoding.contracts import Opening, Window
from d3llm_ray.decoding.rules import FamilyRules
from d3llm_ray.errors import require, unknown
from d3llm_ray.models import BlockCausal

Suffix = Literal["recompute", "cached", "none"]
BlockCacheKind = Literal["none", "prefix", "dual"]


def _with_previous(start: int, rules: FamilyRules) -> int:
    """With shifted logits the row before the window predicts its first token: it is computed with it every time."""
    return max(start - 1, 0) if rules.logit_shift else start


@dataclass(frozen=True)
class NoCache:
    """Every forward computes the whole canvas."""

    uses_cache: ClassVar[bool] = False

    def window(self, canvas: Canvas, opening: Opening, rules: FamilyRules) -> Window:
        return Window(0, canvas.length, canvas.length)


@dataclass(frozen=True)
class BlockCache:
    """Fast-dLLM v1's block-wise caches (arXiv:2505.22618, section 3.2).

    Entering a block computes the whole canvas; later forwards of that block compute it alone ("dual": keys of
    prefix and suffix as of the entry), or from it to the end of the canvas ("prefix"). `repeat_finished`: a block that
    its first forward finishes is computed once more, as the published code does; no token depends on it.
    """

    cache: BlockCacheKind = "none"
    repeat_finished: bool = False

    def __post_init__(self) -> None:
        require(isinstance(self.repeat_finished, bool), "repeat_finished", self.repeat_finished, "true or false")
        if self.cache not in get_args(BlockCacheKind):
            raise unknown("cache", self.cache, get_args(BlockCacheKind))

    @property
    def uses_cache(self) -> bool:
        return self.cache != "none"

    def window(self, canvas: Canvas, opening: Opening, rules: FamilyRules) -> Window:
        entering, canvas.entered = canvas.entered != opening.start, opening.start
        canvas.repeat = entering and self.uses_cache and self.repeat_finished
        if entering or self.cache == "none":
            return Window(0, canvas.length, canvas.length)
        start = _with_previous(canvas.prompt_length + opening.start, rules)
        end = canvas.prompt_length + opening.end if self.cache == "dual" else canvas.length
        return Window(start, end, canvas.length)


@dataclass(frozen=True)
class DelayedCache:
    """d3LLM's delayed cache with refresh (section 4.2).

    A finished block (the prompt is the first) waits `cache_delay` forwards before its keys and values are frozen,
    and meanwhile every forward starts at position 0; with nothing waiting, every `refresh_interval`-th forward does
    too (with 1 every one, also those that freeze). Other forwards start behind the frozen part. `suffix` says what
    happens to the masks behind the active blocks: "recompute" as published, "cached" (their keys as of the first
    forward or the last refresh by interval), or "none": they are not seen.
    """

    cache_delay: int = 1
    refresh_interval: int = 10000
    suffix: Suffix = "recompute"
    uses_cache: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in ("cache_delay", "refresh_interval"):
            value = getattr(self, field)
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(whole and value >= 1, field, value, "a whole number of forwards, 1 or more")
        if self.suffix not in get_args(Suffix):
            raise unknown("suffix", self.suffix, get_args(Suffix))

    def window(self, canvas: Canvas, opening: Opening, rules: FamilyRules) -> Window:
        frozen, waiting = self._walk(canvas, rules)
        start, canvas.cached = canvas.cached, max(canvas.cached, frozen)
        every = self.refresh_interval == 1
        due = every or (frozen <= start and canvas.forwards % self.refresh_interval == 0)
        if due or (frozen <= start and waiting):
            start = 0
        end = canvas.prompt_length + opening.end
        if self.suffix == "recompute" or (self.suffix == "cached" and (due or canvas.forwards == 1)):
            end = canvas.length
        key_length = end if self.suffix == "none" else canvas.length
        return Window(_with_previous(start, rules), end, key_length)

    def _walk(self, canvas: Canvas, rules: FamilyRules) -> tuple[int, bool]:
        """Stamp finished spans in order. Returns the end of what may be frozen now, and whether a span waits."""
        frozen, waiting = canvas.cached, False
        for index in range(canvas.created + 1):
            end = canvas.prompt_length + (canvas.ends[index - 1] if index else 0)
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


@dataclass(frozen=True)
class PipelineCache:
    """D2F's exact cache: blocks see the prompt, the blocks before them and themselves, so that keys never go stale.

    A span is frozen by the first forward that computes it after it was finished, when all before it are.
    """

    uses_cache: ClassVar[bool] = True

    def window(self, canvas: Canvas, opening: Opening, rules: FamilyRules) -> Window:
        start = canvas.cached
        finished = min(canvas.first_open_block(), canvas.created)
        canvas.cached = canvas.prompt_length + (canvas.ends[finished - 1] if finished else 0)
        end = canvas.prompt_length + opening.end
        pattern = BlockCausal(canvas.block_size, canvas.prompt_length)
        return Window(_with_previous(start, rules), end, end, pattern)


@dataclass(frozen=True)
class SubBlockCache:
    """Fast-dLLM v2's two levels (arXiv:2509.26328, section 3.3): exact keys of finished blocks, and with `block_cache`
    stale ones of the other sub-blocks of the block at hand."""

    block_cache: bool = True
    uses_cache: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(isinstance(self.block_cache, bool), "block_cache", self.block_cache, "true or false")

    def window(self, canvas: Canvas, opening: Opening, rules: FamilyRules) -> Window:
        pattern, prompt = BlockCausal(canvas.block_size), canvas.prompt_length
        start = canvas.cached
        if opening.boundary:
            canvas.cached = prompt + opening.start
            return Window(start, canvas.cached, canvas.cached, pattern)
        block = (prompt + opening.start) // canvas.block_size
        entering, canvas.entered = canvas.entered != block, block
        canvas.cached = block * canvas.block_size
        known = opening.start < 0 or not canvas.masked[opening.start]  # no row before it is needed
        if self.block_cache and known and not entering:
            end = prompt + opening.end
            return Window(prompt + opening.start, end, canvas.cached + canvas.block_size, pattern)
        end = canvas.cached + canvas.block_size
        return Window(start, end, end, pattern)


@dataclass(frozen=True)
class CausalCache:
    """Autoregressive decoding: the newest token is computed against everything before it."""

    uses_cache: ClassVar[bool] = True

    def window(self, canvas: Canvas, opening: Opening, rules: FamilyRules) -> Window:
        start, canvas.cached = canvas.cached, canvas.prompt_length + opening.start
        return Window(start, canvas.cached, canvas.cached, BlockCausal(1))
