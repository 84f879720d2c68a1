"""Rows of decoding: what a decoder reached at one batch size and canvas length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Round:
    """One pass over all requests."""

    tokens: int
    seconds: float

    @property
    def tps(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class BenchmarkRow:
    """Figures of one cell; counting rules in `decoding_report.COUNTING`.

    Figures per forward are means over `steps`, the batched forwards; `forwards` adds up over requests.
    `tps`, `seconds` and `ms` are medians of the rounds, `tps_low` and `tps_high` their extremes; `overhead` is the
    median of the steps, with their first and third quartiles; `phases_ms` comes from a pass of its own.
    """

    model: str
    decoder: str
    task: str
    settings: dict[str, Any]
    batch_size: int
    max_tokens: int
    prompt_tokens: float  # mean
    count: int  # prompts
    tokens: int
    forwards: int
    steps: int
    tpf: float
    tps: float
    tps_low: float
    tps_high: float
    seconds: float
    ms: float
    phases_ms: dict[str, float]
    window: float  # mean positions computed for a request in a forward
    flops: float
    bytes: float
    compute_bound: float  # share of forwards
    roofline_ms: float
    roofline_tps: float
    roofline_percent: float
    overhead: float
    overhead_low: float
    overhead_high: float
    rounds: tuple[Round, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def label(self) -> str:
        """The decoder, with its suffix mode where it has one."""
        suffix = self.settings.get("suffix")
        return self.decoder if suffix is None else f"{self.decoder} ({suffix})"


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest."""
    return median(values), min(values), max(values)
