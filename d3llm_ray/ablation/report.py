"""What the students show: each row's figures over its seeds, and what the recipe gains over it beside the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from d3llm_ray.ablation.plan import THRESHOLD, Design
from d3llm_ray.ablation.settings import AblateSettings
from d3llm_ray.ablation.statistics import Estimate, Verdict, differences, estimate, gains, verdict
from d3llm_ray.ablation.trial import Record
from d3llm_ray.ablation.variants import RECIPE, TEACHER, Variant
from d3llm_ray.evaluation.report import COUNTING, is_anchor, score
from d3llm_ray.evaluation.rows import EvaluationRow
from d3llm_ray.report import WrittenReport, machine, table, versions

BySeed = dict[int, float | None]

PAPER = "arXiv:2601.07568 (8B models)"

GAINS = {
    "gain": "what the recipe, or the row that is named, has more than the row, seed by seed: TPF and AUP in percent of "
    "the row's, accuracy in points",
    "interval": "95 %, Student's t over the seeds, which vary the training only: rows and problems are the same",
    "verdict": "agrees: the interval of the gain in TPF lies above 0, as the paper's figure does; disagrees: below 0; "
    "gain or loss where the paper has no figure; not resolved: 0 is inside the interval",
}


@dataclass(frozen=True)
class Figures:
    """One figure of a row over its seeds, and what the row that it is compared with has more."""

    estimate: Estimate | None
    gain: Estimate | None = None


@dataclass(frozen=True)
class Line:
    """One row of the report. Accuracy in percent and TPF are those at the reference threshold."""

    name: str
    claim: str
    against: str | None  # None: the recipe itself
    accuracy: Figures
    tpf: Figures
    aup: Figures
    published_gain: float | None
    verdict: Verdict | None
    points: tuple[tuple[float, float], ...]  # mean (TPF, accuracy) at every threshold


@dataclass(frozen=True)
class AblationReport(WrittenReport):
    """All rows, the teacher's measurements and the reasons of the trials that failed, by key."""

    settings: AblateSettings
    steps: int  # optimizer steps of every student
    lines: tuple[Line, ...]
    teacher: tuple[EvaluationRow, ...]
    rows: tuple[EvaluationRow, ...]  # of the students, labelled by the trials' keys
    failures: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings.model_dump(mode="json"),
            "steps": self.steps,
            "lines": [asdict(line) for line in self.lines],
            "teacher": [row.to_dict() for row in self.teacher],
            "rows": [row.to_dict() for row in self.rows],
            "failures": dict(self.failures),
            "machine": machine(),
            "versions": versions(),
            "counting": {**COUNTING, **GAINS, "paper": PAPER},
        }

    def to_markdown(self) -> str:
        """The setting in a sentence, the table, how to read it, and what failed."""
        settings = self.settings
        setting = (
            f"{settings.seeds} seeds, {self.steps} optimizer steps; {settings.count} {settings.split} problems of "
            f"{settings.task}, {settings.decoder}, {THRESHOLD} {settings.reference_threshold:g} (AUP: "
            f"{', '.join(f'{value:g}' for value in sorted(settings.thresholds))}); means ± half their 95 % intervals\n"
        )
        header = ["claim", "row", "verdict", "TPF gain (%)", "paper (%)", "accuracy gain", "AUP gain (%)"]
        body = [*map(_teacher_cells, self.teacher), *map(_cells, self.lines)]
        legend = "".join(f"- {name}: {text}\n" for name, text in {**GAINS, "paper": PAPER}.items())
        failed = "".join(f"- {key}: {reason}\n" for key, reason in self.failures.items())
        parts = [setting, table([*header, "accuracy (%)", "TPF", "AUP"], body, left=3), legend]
        if lost := sum(row.errors for row in (*self.teacher, *self.rows)):
            parts.append(f"{lost} problems of all rows together have no answer and count as wrong.\n")
        return "\n".join([*parts, *([f"Failed trials, not in the table:\n\n{failed}"] if failed else [])])


def make_report(design: Design, steps: int, records: Sequence[Record], failures: Mapping[str, str]) -> AblationReport:
    """Score all rows together, sum up over seeds and compare.

    As in every report, AUP takes the best accuracy of any row, and the teacher's measured vanilla run as every
    student's first point; without that run there is no AUP.
    """
    teacher = [row for record in records if record.variant == TEACHER for row in record.rows]
    students = [record for record in records if record.variant != TEACHER]
    rows = [row for record in students for row in record.rows]
    anchored = any(is_anchor(row) for row in teacher)
    scored = score([*teacher, *rows], {row.model: teacher[0].model for row in rows if anchored}).rows
    aups = {row.model: row.aup for row in scored if anchored}
    of = {name: [record for record in students if record.variant == name] for name in (RECIPE, *design.variants)}
    compared = {RECIPE: Variant(claim=RECIPE), **design.variants}
    lines = [_line(name, variant, of, aups, design.settings) for name, variant in compared.items()]
    return AblationReport(
        settings=design.settings,
        steps=steps,
        lines=tuple(lines),
        teacher=scored[: len(teacher)],
        rows=scored[len(teacher) :],
        failures=failures,
    )


def _line(
    name: str,
    variant: Variant,
    of: Mapping[str, Sequence[Record]],
    aups: Mapping[str, float | None],
    settings: AblateSettings,
) -> Line:
    against = None if name == RECIPE else variant.against
    reference = settings.reference_threshold

    def by_seed(row: str) -> tuple[BySeed, BySeed, BySeed]:
        """(accuracy, TPF, AUP) of a row's students, each by seed."""
        at = {
            record.seed: next(measured for measured in record.rows if measured.settings[THRESHOLD] == reference)
            for record in of[row]
        }
        accuracy: BySeed = {seed: measured.accuracy for seed, measured in at.items()}
        tpf: BySeed = {seed: measured.tpf for seed, measured in at.items()}
        return accuracy, tpf, {seed: aups.get(measured.model) for seed, measured in at.items()}

    def figures(values: BySeed, gained: list[float]) -> Figures:
        return Figures(estimate([value for value in values.values() if value is not None]), estimate(gained))

    accuracy, tpf, aup = by_seed(name)
    other_accuracy, other_tpf, other_aup = by_seed(against) if against else ({}, {}, {})
    tpf_figures = figures(tpf, gains(other_tpf, tpf))
    return Line(
        name=name,
        claim=variant.claim,
        against=against,
        accuracy=figures(accuracy, differences(other_accuracy, accuracy)),
        tpf=tpf_figures,
        aup=figures(aup, gains(other_aup, aup)),
        published_gain=variant.published_gain,
        verdict=verdict(tpf_figures.gain, variant.published_gain) if against else None,
        points=_points([row for record in of[name] for row in record.rows], settings.thresholds),
    )


def _points(rows: Sequence[EvaluationRow], thresholds: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Mean (TPF, accuracy) at every threshold, by rising threshold."""
    at = [[row for row in rows if row.settings[THRESHOLD] == threshold] for threshold in sorted(thresholds)]
    return tuple((fmean(row.tpf for row in same), fmean(row.accuracy for row in same)) for same in at if same)


def _teacher_cells(row: EvaluationRow) -> list[str]:
    threshold = f", {row.settings[THRESHOLD]:g}" if THRESHOLD in row.settings else ""
    aup = "-" if row.aup is None else f"{row.aup:.1f}"
    measured = [f"{row.accuracy:.1f}", f"{row.tpf:.2f}", aup]
    return [TEACHER, f"{row.decoder}{threshold}", *["-"] * 5, *measured]


def _cells(line: Line) -> list[str]:
    name = line.name if line.against in (None, RECIPE) else f"{line.name} (against {line.against})"
    paper = "-" if line.published_gain is None else f"{line.published_gain:+g}"
    return [
        line.claim,
        name,
        line.verdict or "-",
        _gain(line.tpf.gain),
        paper,
        _gain(line.accuracy.gain),
        _gain(line.aup.gain),
        _mean(line.accuracy.estimate, 1),
        _mean(line.tpf.estimate, 2),
        _mean(line.aup.estimate, 1),
    ]


def _mean(value: Estimate | None, digits: int) -> str:
    if value is None:
        return "-"
    half = "" if value.half_width is None else f" ± {value.half_width:.{digits}f}"
    return f"{value.mean:.{digits}f}{half}"


def _gain(value: Estimate | None) -> str:
    if value is None:
        return "-"
    interval = "" if value.low is None or value.high is None else f" ({value.low:+.1f} to {value.high:+.1f})"
    return f"{value.mean:+.1f}{interval}"
