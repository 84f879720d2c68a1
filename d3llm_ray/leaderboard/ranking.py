"""Systems of a task in the order of their AUP, with what is known of the difference to the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d3llm_ray.evaluation.aup import aup
from d3llm_ray.evaluation.comparisons import compare
from d3llm_ray.evaluation.report import accuracy_cell, too_few
from d3llm_ray.leaderboard.standings import MeasuredSystem, aup_intervals, best_accuracy
from d3llm_ray.report import table


@dataclass(frozen=True)
class Standing:
    """A system on a task. `interval`: of its AUP, 95 %, over problems; None where nothing is right.

    `p_value`: the exact McNemar test that its accuracy and the leader's are the same; None for the leader itself.
    """

    task: str
    system: str
    aup: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    measured: MeasuredSystem

    def to_dict(self) -> dict[str, Any]:
        own, anchor = self.measured.own, self.measured.anchor
        figures = {"task": self.task, "system": self.system, "aup": self.aup, "aup_interval": self.interval}
        return {**figures, "p_value": self.p_value, "row": own.to_dict(), "anchor": anchor.to_dict()}


def rank(task: str, systems: Mapping[str, MeasuredSystem]) -> list[Standing]:
    """The systems of a task, best AUP first. The best accuracy is that of any row, anchors included."""
    best = best_accuracy([row for each in systems.values() for row in (each.anchor, each.own)])
    intervals = aup_intervals(systems) if best else {}
    scores = {name: aup(each.points, best) if best and each.own.tpf else None for name, each in systems.items()}
    order = sorted(systems, key=lambda name: -(scores[name] or 0.0))
    leader = systems[order[0]].own
    return [
        Standing(task, name, scores[name], intervals.get(name), _p_value(leader, systems[name]), systems[name])
        for name in order
    ]


def _p_value(leader: Any, measured: MeasuredSystem) -> float | None:
    compared = compare([leader, measured.own]) if measured.own is not leader else ()
    return compared[0].p_value if compared else None


def to_markdown(standings: Sequence[Standing]) -> str:
    """A table a task; below them systems whose AUP could as well be the leader's, and rows with too few problems."""
    header = ["system", "settings", "accuracy", "p", "TPF", "TPS", "AUP", "95 %"]
    parts = []
    for task in dict.fromkeys(each.task for each in standings):
        own = [each for each in standings if each.task == task]
        parts.append(f"## {task}\n\n{table(header, [_cells(each) for each in own], left=2)}{_tied(own)}")
    rows = list({id(row): row for each in standings for row in (each.measured.anchor, each.measured.own)}.values())
    return "\n".join(
        [*parts, f"{too_few(rows)}\np: that accuracy is the leader's (McNemar, exact, the same problems)\n\n"]
    )


def _tied(standings: Sequence[Standing]) -> str:
    leader = standings[0]
    if leader.interval is None:
        return ""
    close = [each.system for each in standings[1:] if each.interval and each.interval[1] >= leader.interval[0]]
    return f"\nIntervals of AUP that reach into that of {leader.system}: {', '.join(close)}\n" if close else ""


def _cells(each: Standing) -> list[str]:
    own = each.measured.own
    chosen = ", ".join(
        f"{name} {value}" for name, value in own.settings.items() if name.endswith("threshold") and value is not None
    )
    figures = [accuracy_cell(own)]
    figures.append("" if each.p_value is None else f"{each.p_value:.2g}")
    figures += [f"{own.tpf:.2f}", f"{own.tps:.0f}", "-" if each.aup is None else f"{each.aup:.1f}"]
    figures.append("" if each.interval is None else f"{each.interval[0]:.1f} - {each.interval[1]:.1f}")
    return [each.system, f"`{own.settings['decoder']}` {chosen}".strip(), *figures]
