"""Rows of benchmarks that do the same work in several ways: items a second of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d3llm_ray.benchmark.report import Columns
from d3llm_ray.benchmark.rows import spread


@dataclass(frozen=True)
class RateRow:
    """One way of doing the work: `items` in each run, which took `seconds`; `facts` are of the benchmark's own."""

    name: str
    items: int
    seconds: tuple[float, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def per_second(self) -> tuple[float, float, float]:
        """Items a second: median, least and greatest of the runs."""
        return spread([self.items / seconds for seconds in self.seconds])

    def to_dict(self) -> dict[str, Any]:
        median, low, high = self.per_second
        return {
            "name": self.name,
            "items": self.items,
            "seconds": self.seconds,
            "per_second": median,
            "per_second_low": low,
            "per_second_high": high,
            **self.facts,
        }


def rate_columns(unit: str) -> Columns[RateRow]:
    """The table of items that are called `unit`."""
    return (
        ("way", lambda row: row.name),
        (f"{unit}/s", lambda row: f"{row.per_second[0]:.2f}"),
        ("least", lambda row: f"{row.per_second[1]:.2f}"),
        ("greatest", lambda row: f"{row.per_second[2]:.2f}"),
    )
