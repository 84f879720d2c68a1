"""Accuracy against parallelism, and the area that AUP measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d3llm_ray.evaluation.aup import area_curve
from d3llm_ray.evaluation.report import EvaluationReport, is_anchor, method_points
from d3llm_ray.evaluation.rows import EvaluationRow
from d3llm_ray.report import save_figure

_MARKERS = "osD^vP*X"


def plot_report(report: EvaluationReport, path: Path) -> None:
    """Draw two panels a task and write them as a PNG.

    Left: every row as accuracy (percent, 95 % interval) over tokens per forward, methods joined by lines. Right:
    the weighted accuracy curve of every method, the area under which is its AUP.
    """
    tasks = list(dict.fromkeys(row.task for row in report.rows))
    figure = Figure(figsize=(11, 4.2 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for (left, right), task in zip(axes, tasks, strict=True):
        rows = [row for row in report.rows if row.task == task]
        methods = list(dict.fromkeys((row.model, row.decoder) for row in rows))
        for index, (model, decoder) in enumerate(methods):
            points = [row for row in rows if (row.model, row.decoder) == (model, decoder)]
            style = {"color": f"C{index % 10}", "marker": _MARKERS[index % len(_MARKERS)]}
            _draw_points(left, points, f"{model}, {decoder}", style)
            _draw_area(right, rows, points[0], report.anchors, style)
        _finish(left, f"{task}: accuracy against parallelism", "accuracy (%)")
        _finish(right, f"{task}: the area that AUP measures", "weighted accuracy (%)")
    save_figure(figure, path)


def _draw_points(axes: Axes, rows: list[EvaluationRow], label: str, style: Mapping[str, Any]) -> None:
    rows = sorted(rows, key=lambda row: row.tpf)
    accuracy = [row.accuracy for row in rows]
    below = [row.accuracy - row.accuracy_low for row in rows]
    above = [row.accuracy_high - row.accuracy for row in rows]
    tpf = [row.tpf for row in rows]
    axes.errorbar(tpf, accuracy, yerr=[below, above], label=label, capsize=3, linewidth=1, **style)


def _draw_area(
    axes: Axes, rows: list[EvaluationRow], method: EvaluationRow, anchors: Mapping[str, str], style: Mapping[str, Any]
) -> None:
    if method.aup is None:
        return
    best = max(row.accuracy for row in rows)
    points = method_points(rows, (method.model, method.decoder, method.task), anchors)
    tpf, height = area_curve(points, best)
    label = f"{method.model}, {method.decoder}: {method.aup:.0f}"
    if not is_anchor(method):
        axes.fill_between(tpf, height, alpha=0.12, color=style["color"])
    axes.plot(tpf, height, label=label, linewidth=1, markevery=range(2, len(tpf)), **style)


def _finish(axes: Axes, title: str, quantity: str) -> None:
    axes.set(title=title, xlabel="tokens per forward", ylabel=quantity)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
