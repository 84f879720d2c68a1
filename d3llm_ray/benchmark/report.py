"""The one report of every benchmark: tables for people, and one line of JSON for programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from d3llm_ray.benchmark.machine import Machine
from d3llm_ray.benchmark.ratios import Ratio
from d3llm_ray.report import WrittenReport, machine, table, versions


class ReportRow(Protocol):
    """A line of a benchmark's table."""

    def to_dict(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=ReportRow)
Columns = Sequence[tuple[str, Callable[[R], str]]]  # heading, and what a row has there


@dataclass(frozen=True)
class BenchmarkReport(WrittenReport, Generic[R]):
    """The measured rows with all that is needed to read them.

    JSON, for every benchmark: `benchmark` (which one), `rows`, `ratios`, `roofline` (null where none is drawn),
    `memory` (bytes), `plan` (the settings that were measured), `machine`, `versions`, `counting` (how every figure is
    counted: a number without its rule cannot be compared).
    """

    benchmark: str
    plan: Mapping[str, Any]
    rows: tuple[R, ...]
    ratios: tuple[Ratio, ...]
    columns: Columns[R]
    counting: Mapping[str, str]
    roofline: Machine | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    lines: Sequence[str] = ()  # for people, above the tables
    environment: Mapping[str, Any] = field(default_factory=dict)  # facts about the machine that only this run knows

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "rows": [row.to_dict() for row in self.rows],
            "ratios": [asdict(ratio) for ratio in self.ratios],
            "roofline": None if self.roofline is None else asdict(self.roofline),
            "memory": dict(self.memory),
            "plan": dict(self.plan),
            "machine": {**machine(), **self.environment},
            "versions": versions(),
            "counting": dict(self.counting),
        }

    def to_markdown(self) -> str:
        lines = list(self.lines)
        if "peak" in self.memory:
            lines.append(f"peak memory {self.memory['peak'] / 2**30:.2f} GiB")
        if self.roofline is not None:
            lines.append(str(self.roofline))
        headings = [heading for heading, _ in self.columns]
        parts = [table(headings, ([cell(row) for _, cell in self.columns] for row in self.rows), left=1)]
        if lines:
            parts.insert(0, "\n".join(lines) + "\n")
        if self.ratios:
            cells = ([r.name, r.what, f"{r.value:.3g}", f"{r.low:.3g} - {r.high:.3g}"] for r in self.ratios)
            parts.append(table(["ratio", "of", "median", "spread"], cells, left=2))
        return "\n".join(parts)


def between(median: float, low: float, high: float, digits: int = 1) -> str:
    """A figure with its extremes, for a cell."""
    return f"{median:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"
