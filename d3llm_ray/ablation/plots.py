"""What the recipe gains over each row, and accuracy against parallelism of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from d3llm_ray.ablation.report import AblationReport, Line
from d3llm_ray.ablation.variants import RECIPE, TEACHER
from d3llm_ray.evaluation.report import is_anchor
from d3llm_ray.report import save_figure

_MARKERS = "os^vDP*X"


def plot_gains(report: AblationReport, path: Path) -> None:
    """Draw the gain in TPF over every row with its interval, by claim, and the published one; write a PNG."""
    lines = [line for line in report.lines if line.against is not None]
    colors = _colors(lines)
    figure = Figure(figsize=(7.5, 1.4 + 0.36 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.5", linewidth=1)
    for place, line in enumerate(lines):
        gain, color = line.tpf.gain, colors[line.claim]
        if gain is not None:
            spread = None if gain.half_width is None else [gain.half_width]
            axes.errorbar([gain.mean], [place], xerr=spread, color=color, marker="o", capsize=3)
        if line.published_gain is not None:
            axes.plot(line.published_gain, place, color="black", marker="D", fillstyle="none", linestyle="none")
    axes.plot([], [], color="black", marker="D", fillstyle="none", linestyle="none", label="paper, 8B models")
    axes.errorbar([], [], xerr=[], color="0.4", marker="o", capsize=3, label="here: mean and 95 % interval")
    names = [line.name if line.against == RECIPE else f"{line.name}\n(against {line.against})" for line in lines]
    axes.set_yticks(range(len(lines)), names)
    axes.invert_yaxis()
    axes.set(xlabel="gain in tokens per forward (%)", title="What the recipe gains over each row")
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    save_figure(figure, path)


def plot_points(report: AblationReport, path: Path) -> None:
    """Draw every row's mean accuracy (percent) over its mean TPF at all thresholds, coloured by claim; write a PNG."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    colors = _colors([line for line in report.lines if line.against is not None])
    for line in report.lines:
        siblings = [other.name for other in report.lines if other.claim == line.claim]
        marker = _MARKERS[siblings.index(line.name) % len(_MARKERS)]
        tpf, accuracy = [point[0] for point in line.points], [point[1] for point in line.points]
        is_recipe = line.against is None
        axes.plot(
            tpf,
            accuracy,
            color="black" if is_recipe else colors[line.claim],
            linewidth=2.5 if is_recipe else 1,
            marker=marker,
            markersize=5,
            zorder=3 if is_recipe else 2,
            label=line.name,
        )
    anchor = [row for row in report.teacher if is_anchor(row)]
    swept = [row for row in report.teacher if not is_anchor(row)]
    axes.plot(
        [row.tpf for row in swept],
        [row.accuracy for row in swept],
        color="0.6",
        linestyle="--",
        marker="o",
        markersize=4,
        label=TEACHER,
    )
    axes.scatter([row.tpf for row in anchor], [row.accuracy for row in anchor], color="0.6", marker="s")
    thresholds = ", ".join(f"{value:g}" for value in sorted(report.settings.thresholds))
    axes.set(
        title=f"Means over seeds at entropy thresholds {thresholds} (square: the teacher's vanilla run)",
        xlabel="tokens per forward",
        ylabel="accuracy (%)",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    save_figure(figure, path)


def _colors(lines: Sequence[Line]) -> dict[str, str]:
    claims = list(dict.fromkeys(line.claim for line in lines))
    return {claim: f"C{index % 10}" for index, claim in enumerate(claims)}
