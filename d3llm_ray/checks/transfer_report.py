"""The report of `check transfer`: four decoders on one task, and whether the task was worth a search of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from d3llm_ray.evaluation.report import accuracy_cell, too_few
from d3llm_ray.evaluation.rows import EvaluationRow
from d3llm_ray.report import WrittenReport, machine, table, versions
from d3llm_ray.tuning.held_out import HeldOut, HeldOutRun, compare
from d3llm_ray.tuning.objective import Metric, SearchObjective
from d3llm_ray.tuning.outcomes import outcomes_of

COUNTING = {
    "aup": "of the first row's point at one token a forward and the row's own; `score`: what the searches maximised",
    "difference": "tuned on the source minus tuned on the task; 95 % by resampling the problems, the same for both and "
    "for the anchor",
}


@dataclass(frozen=True)
class TransferReport(WrittenReport):
    """`rows`: one token a forward, the decoder's own settings, those tuned on the task, those tuned on the source."""

    source: str
    task: str
    metric: Metric
    seed: int
    rows: tuple[EvaluationRow, ...]

    @cached_property
    def objective(self) -> SearchObjective | None:
        """What the searches maximised, with this task's anchor; None where nothing is right at one token a forward."""
        anchor = self.rows[0]
        if not (anchor.accuracy and anchor.tpf):
            return None
        return SearchObjective(self.metric, (anchor.tpf, anchor.accuracy), 0.0)

    @cached_property
    def compared(self) -> HeldOut | None:
        """The source's settings (first) with the task's (second)."""
        anchor, _, of_task, of_source = self.rows
        if self.objective is None:
            return None
        return compare(_run(of_source), _run(of_task), _run(anchor), self.objective, self.seed)

    @property
    def verdict(self) -> str:
        """One sentence, from the interval of the score's difference."""
        _, _, of_task, of_source = self.rows
        if self.compared is None:
            return f"Nothing is right at one token a forward on {self.task}: no AUP says which settings are better."
        if of_source.settings == of_task.settings:
            return f"Both searches chose the same settings: {self.task} needs no search of its own."
        found = self.compared.differences["score"]
        figures = f"{self.metric} {found.value:+.4g}, 95 % interval {found.low:+.4g} to {found.high:+.4g}"
        tuned = f"Settings tuned on {self.source}"
        if found.high < 0:
            return f"{tuned} are worse on {self.task} than those tuned on it ({figures}): it is worth its own search."
        if found.low > 0:
            return f"{tuned} are better on {self.task} than those tuned on it ({figures})."
        return f"{tuned} could not be told on {self.task} from those tuned on it ({figures})."

    def to_markdown(self) -> str:
        first = self.rows[0]
        head = f"# Settings of one task on another\n\n{first.model}, {self.task}, {first.problems} problems\n\n"
        header = ["decoder", "settings that differ", "accuracy", "TPF", "TPS", "AUP"]
        lines = []
        for row in self.rows:
            cells = [row.decoder, _differing(row, self.rows[1]), accuracy_cell(row)]
            lines.append([*cells, f"{row.tpf:.2f}", f"{row.tps:.0f}", self._aup(row)])
        return f"{head}{table(header, lines, left=2)}\n{self.verdict}\n{too_few(self.rows)}"

    def _aup(self, row: EvaluationRow) -> str:
        if self.objective is None or not row.tpf:
            return "-"
        return f"{self.objective.aup(row.tpf, row.accuracy):.1f}"

    def to_dict(self) -> dict[str, Any]:
        asked = {"check": "transfer", "source": self.source, "task": self.task, "metric": self.metric}
        compared = None if self.compared is None else self.compared.to_dict()
        found = {"rows": [row.to_dict() for row in self.rows], "compared": compared, "verdict": self.verdict}
        return {**asked, **found, "machine": machine(), "versions": versions(), "counting": COUNTING}


def _run(row: EvaluationRow) -> HeldOutRun:
    return HeldOutRun(row.decoder, row.settings, outcomes_of(row.samples), row.tps)


def _differing(row: EvaluationRow, own: EvaluationRow) -> str:
    """The settings that a search chose, against the decoder's own."""
    if row is own or row.settings["decoder"] != own.settings["decoder"]:
        return ""
    changed = {name: value for name, value in row.settings.items() if value != own.settings[name]}
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in changed.items()
    )
