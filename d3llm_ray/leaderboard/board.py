"""Tables scored: AUP of every method on every task and its average, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from d3llm_ray.evaluation.aup import ALPHA, OFFSET, Point, aup, counted_points, leaderboard
from d3llm_ray.leaderboard.points import PointsTable
from d3llm_ray.report import WrittenReport, table

COUNTING = {
    "aup": "area of accuracy over tokens per forward, discounted by its distance from the task's best accuracy",
    "best": "by task: the best accuracy of any method, methods that are not drawn and the file's `best` included",
    "average": "the sum of a method's AUPs over the table's divisor; without one, over the number of its own tasks",
    "left_out": "points that do not count, as their accuracy is more than the offset below that at the smallest "
    "tokens per forward; the published program stops with an assertion where the last point is one of these",
}


@dataclass(frozen=True)
class ScoredMethod:
    """AUP by task (None where no method of the task has a right answer) and the average; None without any."""

    name: str
    aup: Mapping[str, float | None]
    average: float | None
    left_out: Mapping[str, tuple[Point, ...]]


@dataclass(frozen=True)
class ScoredTable:
    """Methods of one table, best average first. `best`: by task, the accuracy that all are measured against."""

    table: PointsTable
    best: Mapping[str, float]
    methods: tuple[ScoredMethod, ...]

    def to_markdown(self) -> str:
        tasks, notes = self.table.tasks, any(method.note for method in self.table.methods.values())
        header = ["method", *(["note"] if notes else []), *tasks, "average"]
        rows = []
        for method in self.methods:
            note = [self.table.methods[method.name].note] if notes else []
            figures = [*(method.aup.get(task) for task in tasks), method.average]
            rows.append([method.name, *note, *("-" if each is None else f"{each:.2f}" for each in figures)])
        best = [f"{self.best[task]:.2f} %" for task in tasks]
        rows.append(["best accuracy", *([""] if notes else []), *best, ""])
        source = f"\n{self.table.source}\n" if self.table.source else ""
        return f"## {self.table.title}\n{source}\n{table(header, rows, left=2 if notes else 1)}{self._left_out()}"

    def _left_out(self) -> str:
        lines = [
            f"- {method.name}, {task}: {', '.join(f'{accuracy:g} % at {tpf:g}' for tpf, accuracy in points)}"
            for method in self.methods
            for task, points in method.left_out.items()
        ]
        return "\n".join(["\nDoes not count, being too far below the first point:", *lines, ""]) if lines else ""

    def to_dict(self) -> dict[str, Any]:
        methods = {
            each.name: {"aup": dict(each.aup), "average": each.average, "left_out": dict(each.left_out)}
            for each in self.methods
        }
        return {"title": self.table.title, "source": self.table.source, "best": dict(self.best), "methods": methods}


@dataclass(frozen=True)
class Board(WrittenReport):
    """Several tables, each scored by itself: a task's best accuracy is its own table's."""

    tables: tuple[ScoredTable, ...]
    alpha: float = ALPHA
    offset: float = OFFSET
    above: str = ""  # Markdown before the tables
    more: Mapping[str, Any] = field(default_factory=dict)  # beside the tables in the JSON

    def to_markdown(self) -> str:
        return self.above + "\n".join(each.to_markdown() for each in self.tables)

    def to_dict(self) -> dict[str, Any]:
        tables = [each.to_dict() for each in self.tables]
        return {"tables": tables, "alpha": self.alpha, "offset": self.offset, "counting": COUNTING, **self.more}


def score_tables(tables: Iterable[PointsTable], alpha: float = ALPHA, offset: float = OFFSET) -> Board:
    """Every table scored; `alpha` and `offset` are those of `evaluation.aup.aup`."""
    return Board(tuple(score_table(each, alpha, offset) for each in tables), alpha, offset)


def score_table(points: PointsTable, alpha: float = ALPHA, offset: float = OFFSET) -> ScoredTable:
    """AUP of every method on its tasks (d3LLM, arXiv:2601.07568), and averages by which the methods are ordered."""
    best = {task: _best(points, task) for task in points.tasks}
    scores: dict[str, dict[str, float | None]] = {}
    left_out: dict[str, dict[str, tuple[Point, ...]]] = {}
    for name, method in points.methods.items():
        scores[name], left_out[name] = {}, {}
        for task, pairs in method.points.items():
            scores[name][task] = aup(pairs, best[task], alpha, offset) if best[task] else None
            kept = set(counted_points(pairs, offset))
            if missing := tuple(pair for pair in pairs if pair not in kept):
                left_out[name][task] = missing
    known = {name: {task: each for task, each in of.items() if each is not None} for name, of in scores.items()}
    averages = leaderboard({name: of for name, of in known.items() if of}, points.divisor)
    order = [*averages, *(name for name in scores if name not in averages)]
    scored = [ScoredMethod(name, scores[name], averages.get(name), left_out[name]) for name in order]
    return ScoredTable(points, best, tuple(scored))


def _best(points: PointsTable, task: str) -> float:
    reached = [accuracy for method in points.methods.values() for _, accuracy in method.points.get(task, ())]
    return max([*reached, points.best.get(task, 0.0)])
