"""The report of a check: its question, every decoder's figures, and a verdict that is computed from their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from d3llm_ray.checks.claims import Check
from d3llm_ray.checks.figures import AgainstFirst, Gain, against_first, single_aups, verdict
from d3llm_ray.evaluation.report import accuracy_cell, too_few
from d3llm_ray.evaluation.rows import EvaluationRow
from d3llm_ray.report import WrittenReport, machine, table, versions

FIGURES = {"tpf": "tokens per forward", "tps": "tokens a second", "aup": "AUP"}
COUNTING = {
    "accuracy": "percent of all problems, 95 % Wilson interval; differences: points, Newcombe's interval, McNemar's p",
    "tpf": "tokens / forwards; gains in percent, 95 % by resampling the problems, the same for both",
    "tps": "tokens / seconds of a round; gains: the median of the ratios of the rounds, and the least and the largest",
    "aup": "of the first variant's accuracy at one token a forward and the variant's own point; `curve`: of all points",
}


@dataclass(frozen=True)
class CheckReport(WrittenReport):
    """`rows`: by variant, in the order of the check's, a row a round."""

    name: str
    check: Check
    model: str
    task: str
    rows: tuple[tuple[EvaluationRow, ...], ...]

    @cached_property
    def gains(self) -> list[AgainstFirst]:
        """Every variant but the first against it."""
        return [against_first(self.rows[0], each) for each in self.rows[1:]]

    def gain(self, each: AgainstFirst) -> Gain:
        """Of the figure that the check is about."""
        return each.tps if self.check.figure == "tps" else each.tpf

    @cached_property
    def aups(self) -> tuple[list[float], float]:
        return single_aups(self.rows[0][0], [each[0] for each in self.rows[1:]])

    @property
    def verdicts(self) -> list[str]:
        if self.check.figure == "aup":
            return [self._best_threshold()]
        labels = [variant.label for variant in self.check.variants]
        return [
            f"{label} against {labels[0]}, {FIGURES[self.check.figure]}: {verdict(self.gain(each), self.check.gain)}"
            for label, each in zip(labels[1:], self.gains, strict=True)
        ]

    def _best_threshold(self) -> str:
        singles, curve = self.aups
        best = singles.index(max(singles))
        row, first = self.rows[1 + best][0], self.rows[0][0]
        return (
            f"The best single setting is {self.check.variants[1 + best].label}: AUP {singles[best]:.1f}, "
            f"{row.accuracy:.1f} % at {row.tpf:.2f} tokens a forward, against {first.accuracy:.1f} % at one; the whole "
            f"curve has {curve:.1f}."
        )

    def to_markdown(self) -> str:
        head = f"# {self.check.question}\n\n{self.model}, {self.task}, {self.rows[0][0].problems} problems\n\n"
        text = "".join(f"- {each}\n" for each in self.verdicts)
        return f"{head}{self.table()}\n{text}{too_few([each[0] for each in self.rows])}"

    def table(self) -> str:
        header = ["decoder", "accuracy", "TPF", "TPS", "accuracy against the first", "p", "TPF", "TPS"]
        singles = self.aups[0] if self.check.figure == "aup" else None
        lines = []
        for number, (variant, rows) in enumerate(zip(self.check.variants, self.rows, strict=True)):
            row = rows[0]
            cells = [variant.label, accuracy_cell(row), f"{row.tpf:.2f}", f"{median(each.tps for each in rows):.0f}"]
            cells += _against(self.gains[number - 1]) if number else [""] * 4
            if singles is not None:
                cells.append(f"{singles[number - 1]:.1f}" if number else "")
            lines.append(cells)
        return table([*header, *([] if singles is None else ["AUP"])], lines, left=1)

    def to_dict(self) -> dict[str, Any]:
        singles, curve = self.aups
        variants = [
            {"label": variant.label, "rows": [row.to_dict() for row in rows], "aup": aup, "against_first": against}
            for variant, rows, aup, against in zip(
                self.check.variants,
                self.rows,
                [None, *singles],
                [None, *(each.to_dict() for each in self.gains)],
                strict=True,
            )
        ]
        asked = {"check": self.name, "question": self.check.question, "model": self.model, "task": self.task}
        published = {"figure": self.check.figure, "published_gain": self.check.gain, "curve_aup": curve}
        where = {"machine": machine(), "versions": versions(), "counting": COUNTING}
        return {**asked, **published, "variants": variants, "verdicts": self.verdicts, **where}


def _against(each: AgainstFirst) -> list[str]:
    points = f"{each.accuracy:+.1f} ({each.accuracy_low:+.1f} to {each.accuracy_high:+.1f})"
    return [points, f"{each.p_value:.2g}", str(each.tpf), str(each.tps)]


def same_answers(rounds: Sequence[EvaluationRow]) -> bool:
    """Whether every round gave the same texts, tokens and forwards."""
    kept = [[(each.text, each.tokens, each.forwards) for each in row.samples] for row in rounds]
    return all(each == kept[0] for each in kept)
