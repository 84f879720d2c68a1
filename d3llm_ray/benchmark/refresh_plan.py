"""What the benchmark of a cache's refresh measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from d3llm_ray.benchmark.plan import DTYPES, BenchmarkPlan, option, require_count, require_counts, require_distinct
from d3llm_ray.benchmark.workload import Cell, Workload, read_shape, synthetic_prompts
from d3llm_ray.decoding import Decoder, decoder
from d3llm_ray.device import check_device
from d3llm_ray.errors import require, unknown

CACHED, UNCACHED = "d3llm", "d3llm-nocache"


@dataclass(frozen=True)
class RefreshPlan:
    """Every combination of `prompt_tokens` and `block_sizes`, with random weights and a scripted pace.

    What the model says does not matter, so that a model's context does not bound the lengths.

    Raises:
        InputError: a value out of range, a model without the decoders' layout, or options that exclude each other.
    """

    model: str | None = option(None, "zoo name or checkpoint folder whose shape is measured; default tiny-llada")
    shape: str | None = option(None, "published shape in its place: llada-8b or dream-7b")
    prompt_tokens: tuple[int, ...] = option((32, 128, 512, 2048), "tokens of a prompt")
    block_sizes: tuple[int, ...] = option((16, 32, 64), "tokens of a block, divisors of max_tokens")
    intervals: tuple[int, ...] = option((4, 16, 64), "refresh intervals in forwards that the cost is told for")
    max_tokens: int = option(128, "canvas in tokens")
    tpf: float = option(4.0, "tokens revealed a forward on average, whatever the model says")
    batch_size: int = option(1, "requests decoded together")
    count: int = option(1, "prompts decoded in each measurement")
    rounds: int = option(3, "rounds over all measurements; every figure is the median of its rounds")
    dtype: str = option("float32", "precision of the weights: float32, bfloat16 or float16")
    device: str = option("cpu", "cpu, cuda or cuda:N")
    seed: int = option(0, "seed of random weights and prompts")

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "block_sizes", "intervals"):
            require_counts(name, getattr(self, name))
            require_distinct(name, getattr(self, name))
        for name in ("max_tokens", "batch_size", "count", "rounds"):
            require_count(name, getattr(self, name))
        require(min(self.intervals) > 1, "intervals", min(self.intervals), "2 or more: at 1 nothing is cached")
        for size in self.block_sizes:
            require(self.max_tokens % size == 0, "block_sizes", size, f"divisors of max_tokens, {self.max_tokens}")
        require(self.count >= self.batch_size, "count", self.count, f"at least batch_size, {self.batch_size}")
        require(1 <= self.tpf < float("inf"), "tpf", self.tpf, "a number of tokens, 1 or more")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        require(self.model is None or self.shape is None, "shape", self.shape, "a model or a shape, not both")

    def workloads(self) -> Iterator[Workload]:
        """One for each length; its cells are those without a cache and with one, by block size."""
        check_device(self.device)
        name, config, family = read_shape(self.model, self.shape)
        for each in self._decoders(self.block_sizes[0]):
            each.check(family)
        cells = [
            Cell(each.scripted(self.tpf), self.batch_size, self.max_tokens)
            for size in self.block_sizes
            for each in self._decoders(size)
        ]
        longest = max(self.prompt_tokens) + self.max_tokens
        config = replace(config, max_position_embeddings=max(longest, config.max_position_embeddings))
        for length in self.prompt_tokens:
            plan = BenchmarkPlan(
                model=self.model,
                shape=self.shape,
                prompt_tokens=length,
                count=self.count,
                batch_sizes=(self.batch_size,),
                max_tokens=(self.max_tokens,),
                rounds=self.rounds,
                dtype=self.dtype,
                device=self.device,
                seed=self.seed,
            )
            prompts = synthetic_prompts(family, config.vocab_size, self.count, length, self.seed)
            yield Workload(plan, name, "synthetic", config, family, config.vocab_size, prompts, cells)

    def _decoders(self, block_size: int) -> list[Decoder]:
        uncached = decoder(UNCACHED, block_size=block_size)
        return [uncached, decoder(CACHED, block_size=block_size, refresh_interval=min(self.intervals))]
