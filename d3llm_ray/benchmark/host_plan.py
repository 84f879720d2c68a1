"""What the benchmark of the host's share measures."""

from __future__ import annotations

from dataclasses import dataclass

from d3llm_ray.benchmark.machine import MACHINES
from d3llm_ray.benchmark.plan import option, require_count, require_counts
from d3llm_ray.benchmark.shapes import SHAPES
from d3llm_ray.errors import require, unknown


@dataclass(frozen=True)
class HostPlan:
    """Batches of one decoder on a published shape's vocabulary, context and canvas.

    Raises:
        InputError: a value out of range, or an unknown shape or machine.
    """

    shape: str = option("llada-8b", "published shape whose vocabulary and context are used")
    decoder: str | None = option(None, "preset; null: the one that the model is made for")
    prompt_tokens: int = option(144, "tokens of every prompt")
    max_tokens: int = option(256, "canvas in tokens")
    batch_sizes: tuple[int, ...] = option((1, 8, 32), "requests decoded together")
    count: int = option(64, "prompts decoded in each measurement")
    rounds: int = option(3, "rounds over all measurements")
    machine: str = option("h100", "data sheet that the time is set against: a100, h100, h200 or b200")
    seed: int = option(0, "seed of prompts and statistics")

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise unknown("shape", self.shape, SHAPES)
        if self.machine not in MACHINES:
            raise unknown("machine", self.machine, MACHINES)
        for name in ("prompt_tokens", "max_tokens", "count", "rounds"):
            require_count(name, getattr(self, name))
        require_counts("batch_sizes", self.batch_sizes)
        largest = max(self.batch_sizes)
        require(self.count >= largest, "count", self.count, f"at least the largest batch size, {largest}")
