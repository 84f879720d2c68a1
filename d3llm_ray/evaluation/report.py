"""The report: rows scored together, as one line of JSON, as a Markdown table and as files beside their plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from d3llm_ray.evaluation.aup import ALPHA, OFFSET, Point, aup
from d3llm_ray.evaluation.comparisons import PairedComparison, compare, problems_for
from d3llm_ray.evaluation.rows import EvaluationRow
from d3llm_ray.report import WrittenReport, machine, table, versions

ANCHOR_DECODER = "vanilla"
WIDEST = 5.0  # points to a side of an accuracy's interval; with a wider one, its problems are said to be too few

# How every figure is counted, in every report: a number without its rule cannot be compared.
COUNTING = {
    "accuracy": "percent of all problems; accuracy_low and accuracy_high are the 95 % Wilson interval",
    "comparisons": "rows a and b, numbered from 0, on the same problems: exact McNemar test, two-sided; difference "
    "b - a in points with Newcombe's 95 % interval of paired proportions",
    "errors": "problems without an answer (refused by the chat template, too long, logits that are not finite); they "
    "count as wrong",
    "tokens": "tokens before the first stop token, summed over all problems",
    "endpoint": "URL of the server that gave the row's answers, null: an engine of this run; `machine` and `versions` "
    "are then those of the asking side; seconds has HTTP in it",
    "forwards": "model forwards in which the request took part, prefill and refresh included, summed over all problems",
    "tpf": "tokens / forwards",
    "tps": "tokens / seconds; seconds is the wall clock of the whole run at max_batch_size, device synchronised, "
    "after decoding the row's warmup problems once",
    "aup": f"alpha {ALPHA:g}, offset {OFFSET:g}, the task's best accuracy over all rows; the points are those of the "
    f"row's model and decoder, and the measured {ANCHOR_DECODER} point of its anchor (the model itself unless stated)",
}


@dataclass(frozen=True)
class EvaluationReport(WrittenReport):
    """Scored rows. `anchors` maps a model to the model whose vanilla run anchors it, where that is another one."""

    rows: tuple[EvaluationRow, ...]
    anchors: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [row.to_dict() for row in self.rows],
            "anchors": dict(self.anchors),
            "comparisons": [asdict(each) for each in compare(self.rows)],
            "machine": machine(),
            "versions": versions(),
            "counting": COUNTING,
        }

    def to_markdown(self) -> str:
        """The table of all rows; below it, each row against the first of its model and task on the same problems, rows
        with too few problems, and rows of a server."""
        return self.rows_table() + self._compared() + too_few(self.rows) + self._served()

    def rows_table(self) -> str:
        """One line a row; a task column where there are several tasks, errors where there are any."""
        tasks, errors = len({row.task for row in self.rows}) > 1, any(row.errors for row in self.rows)
        left = ["model", "decoder", *(["task"] if tasks else [])]
        header = [*left, "accuracy", *(["errors"] if errors else []), "TPF", "TPS", "AUP"]
        cells = (_cells(row, _decoder_cell(row, self.rows), tasks, errors) for row in self.rows)
        return table(header, cells, left=len(left))

    def _compared(self) -> str:
        first: dict[tuple[str, str], int] = {}
        for number, row in enumerate(self.rows):
            first.setdefault(_home(row), number)
        chosen = [each for each in compare(self.rows) if first[_home(self.rows[each.b])] == each.a]
        if not chosen:
            return ""
        header = ["model", "task", "decoder", "against", "only it", "only the other", "difference", "p"]
        return "\n" + table(header, [_comparison_cells(each, self.rows) for each in chosen], left=4)

    def _served(self) -> str:
        served = [row for row in self.rows if row.endpoint is not None]
        if not served:
            return ""
        named = dict.fromkeys(f"{row.model}: {row.endpoint}, {row.concurrency} requests at a time" for row in served)
        return f"\nMeasured through an endpoint, whose machine and batch size are not known: {'; '.join(named)}\n"


def too_few(rows: Sequence[EvaluationRow]) -> str:
    """A paragraph that names rows whose accuracy is known less well than `WIDEST`; empty without any."""
    wide = [row for row in rows if max(row.accuracy - row.accuracy_low, row.accuracy_high - row.accuracy) > WIDEST]
    named = "; ".join(f"{row.model}, {row.decoder}, {row.task}: {row.problems}" for row in wide)
    if not wide:
        return ""
    return (
        f"\nToo few problems, as the 95 % interval reaches more than {WIDEST:g} points to a side "
        f"({problems_for(WIDEST)} are always enough): {named}\n"
    )


def _home(row: EvaluationRow) -> tuple[str, str]:
    return row.model, row.task


def _comparison_cells(each: PairedComparison, rows: Sequence[EvaluationRow]) -> list[str]:
    a, b = rows[each.a], rows[each.b]
    difference = f"{each.difference:+.1f} ({each.difference_low:+.1f} to {each.difference_high:+.1f})"
    names = [b.model, b.task, _decoder_cell(b, rows), _decoder_cell(a, rows)]
    return [*names, str(each.only_b), str(each.only_a), difference, f"{each.p_value:.2g}"]


def _decoder_cell(row: EvaluationRow, rows: Sequence[EvaluationRow]) -> str:
    """The decoder's label and, where it was measured at several settings, those in which its rows differ."""
    siblings = [other.settings for other in rows if _method(other) == _method(row)]
    differing = [name for name, value in row.settings.items() if any(other[name] != value for other in siblings)]
    return ", ".join([row.decoder, *(f"{name}={row.settings[name]}" for name in differing)])


def accuracy_cell(row: EvaluationRow) -> str:
    """Accuracy with its interval, for a table."""
    return f"{row.accuracy:.1f} % ({row.accuracy_low:.1f} - {row.accuracy_high:.1f})"


def _cells(row: EvaluationRow, decoder: str, with_task: bool, with_errors: bool) -> list[str]:
    score = "-" if row.aup is None else f"{row.aup:.1f}"
    task = [row.task] if with_task else []
    errors = [str(row.errors)] if with_errors else []
    return [row.model, decoder, *task, accuracy_cell(row), *errors, f"{row.tpf:.2f}", f"{row.tps:.1f}", score]


def score(rows: Iterable[EvaluationRow], anchors: Mapping[str, str] | None = None) -> EvaluationReport:
    """Give every row its AUP, computed over all rows.

    A method is one model with one decoder on one task; where several settings of it were measured, all of them are
    its points and its rows share one score. To these comes the method's anchor: the point, TPF as measured, of the
    plain decoder (`vanilla`, one token a step) with the same model, as in the published figures; there TPF is set
    to 1. `anchors` names another model for it, for a student whose own vanilla run was not made. Without a
    measured anchor the method has its own points only. The best accuracy is that of any row of the task.

    The score is None where it is not defined: no row of the task is correct, or a point has no tokens.
    """
    rows, anchors = list(rows), dict(anchors or {})
    scores = {method: _method_score(rows, method, anchors) for method in {_method(row) for row in rows}}
    return EvaluationReport(tuple(replace(row, aup=scores[_method(row)]) for row in rows), anchors)


def _method(row: EvaluationRow) -> tuple[str, str, str]:
    return row.model, row.decoder, row.task


def is_anchor(row: EvaluationRow) -> bool:
    """Whether the row is a run of the plain decoder at one token a step, under whatever label."""
    return row.settings.get("decoder") == ANCHOR_DECODER and row.settings.get("steps") is None


def method_points(
    rows: Sequence[EvaluationRow], method: tuple[str, str, str], anchors: Mapping[str, str]
) -> list[Point]:
    """The distinct points of a method, its anchor among them, in the order of the rows."""
    model, _, task = method
    anchor = (anchors.get(model, model), task)
    chosen = [row for row in rows if _method(row) == method or (is_anchor(row) and (row.model, row.task) == anchor)]
    return list(dict.fromkeys((row.tpf, row.accuracy) for row in chosen))


def _method_score(
    rows: Sequence[EvaluationRow], method: tuple[str, str, str], anchors: Mapping[str, str]
) -> float | None:
    best = max(row.accuracy for row in rows if row.task == method[2])
    points = method_points(rows, method, anchors)
    return aup(points, best) if best > 0 and min(points)[0] > 0 else None
