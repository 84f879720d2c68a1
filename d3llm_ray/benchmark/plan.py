"""What a benchmark measures. Plain data: the command line's settings are made of it, and a bare machine fills it in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from d3llm_ray.errors import require, unknown

DTYPES = ("float32", "bfloat16", "float16")
MEASURED = "measured"


def option(default: Any, description: str) -> Any:
    """A field of a plan with the line that `--help` shows for it."""
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True)
class BenchmarkPlan:
    """Every combination of the four lists is measured: decoders x suffixes x batch_sizes x max_tokens.

    Names (models, shapes, decoders, tasks) are checked by `workload.prepare`, still before any weight is read.

    Raises:
        InputError: a value out of range, or options that exclude each other.
    """

    model: str | None = option(None, "zoo name or checkpoint folder; default tiny-llada, unless a shape is given")
    shape: str | None = option(None, "random weights of a published shape: llada-8b, dream-7b or qwen2.5-7b")
    task: str | None = option(None, "embedded task or task file; default arith, unless prompt_tokens is given")
    prompt_tokens: int | None = option(None, "decode synthetic prompts of this many tokens, to full length")
    count: int = option(32, "prompts decoded in each measurement")
    decoders: tuple[str, ...] = option((), "presets; default: the one that the model is made for")
    suffixes: tuple[str, ...] = option((), "suffix modes, for the decoders that have them; default: the preset's own")
    batch_sizes: tuple[int, ...] = option((1, 8, 32), "requests decoded together")
    max_tokens: tuple[int, ...] = option((64,), "canvas lengths in tokens")
    decoder_settings: dict[str, Any] = field(
        default_factory=dict, metadata={"description": "settings that override those of the presets that have them"}
    )
    scripted_tpf: float | None = option(None, "reveal this many tokens a forward on average, whatever the model says")
    rounds: int = option(3, "rounds over all measurements; every figure is the median of its rounds")
    machine: str = option(MEASURED, "roofline: measured here, or the data sheet of a100, h100, h200 or b200")
    dtype: str = option("float32", "precision of the weights: float32, bfloat16 or float16")
    device: str = option("cpu", "cpu, cuda or cuda:N")
    seed: int = option(0, "seed of random weights and prompts")

    def __post_init__(self) -> None:
        for name in ("count", "rounds"):
            require_count(name, getattr(self, name))
        for name in ("batch_sizes", "max_tokens"):
            require_counts(name, getattr(self, name))
        for name in ("decoders", "suffixes", "batch_sizes", "max_tokens"):
            require_distinct(name, getattr(self, name))
        if self.prompt_tokens is not None:
            require_count("prompt_tokens", self.prompt_tokens)
        largest = max(self.batch_sizes)
        require(self.count >= largest, "count", self.count, f"at least the largest batch size, {largest}")
        scripted = self.scripted_tpf is None or 1 <= self.scripted_tpf < float("inf")
        require(scripted, "scripted_tpf", self.scripted_tpf, "a number of tokens, 1 or more")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        data_sheet = "measured, or a 16-bit dtype (data sheets give the peak of those)"
        require(self.machine == MEASURED or self.dtype != "float32", "machine", self.machine, data_sheet)
        self._check_exclusive()

    def _check_exclusive(self) -> None:
        require(self.model is None or self.shape is None, "shape", self.shape, "a model or a shape, not both")
        synthetic = self.prompt_tokens is not None
        require(self.task is None or not synthetic, "prompt_tokens", self.prompt_tokens, "a task or this, not both")
        accepted = "a number of tokens with --shape, which has no tokenizer for the prompts of a task"
        require(self.shape is None or synthetic, "prompt_tokens", self.prompt_tokens, accepted)

    @property
    def full_length(self) -> bool:
        """Whether every answer fills its canvas: stop tokens mean nothing in what random prompts or weights say."""
        return self.prompt_tokens is not None or self.scripted_tpf is not None


def require_count(name: str, value: object) -> None:
    """Raise `InputError` unless `value` is 1, 2, 3, ..."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(whole, name, value, "a positive whole number")


def require_counts(name: str, values: Sequence[object]) -> None:
    """Raise `InputError` unless there are values, each 1, 2, 3, ..."""
    require(len(values) > 0, name, values, "one or more numbers")
    for value in values:
        require_count(name, value)


def require_distinct(name: str, values: Sequence[object]) -> None:
    """Raise `InputError` where a value stands twice."""
    require(len(set(values)) == len(values), name, list(values), "each value once")
