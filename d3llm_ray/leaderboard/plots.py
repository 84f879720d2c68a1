"""Pictures of a scored table: AUP's curves, a radar over tasks, bars, accuracy over speed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d3llm_ray.evaluation.aup import area_curve
from d3llm_ray.leaderboard.board import ScoredTable
from d3llm_ray.report import save_figure

_MARKERS = "osD^vP*Xh<>"
_COLUMNS = 3
_LEGEND_INCHES = 2.1  # that a name takes
_FEWEST_AXES = 3  # of a radar: two tasks would be a line


def plot_table(scored: ScoredTable, folder: Path, name: str) -> list[Path]:
    """Write `NAME-curves.png`, `NAME-bars.png`, and where there is enough to draw `NAME-radar.png` and `NAME-speed.png`
    (tokens a second); returns the paths."""
    kinds = {"curves": _curves(scored), "bars": _bars(scored), "radar": _radar(scored), "speed": _speed(scored)}
    files = []
    for kind, figure in kinds.items():
        if figure is not None:
            files.append(folder / f"{name}-{kind}.png")
            save_figure(figure, files[-1])
    return files


def _styles(scored: ScoredTable) -> dict[str, dict[str, Any]]:
    """Colour and marker of every method that is drawn: the same in all pictures, by its place in the file."""
    shown = [name for name, method in scored.table.methods.items() if method.shown]
    return {
        name: {"color": f"C{number % 10}", "marker": _MARKERS[number % len(_MARKERS)]}
        for number, name in enumerate(shown)
    }


def _panels(scored: ScoredTable, tasks: list[str]) -> tuple[Figure, Iterator[Axes]]:
    columns = min(len(tasks), _COLUMNS)
    lines = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * lines + 0.9), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    figure.suptitle(scored.table.title)
    for spare in axes.flat[len(tasks) :]:
        spare.set_visible(False)
    return figure, iter(axes.flat)


def _legend(figure: Figure) -> None:
    """One legend for all panels, below them."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = min(len(handles), max(1, int(figure.get_figwidth() / _LEGEND_INCHES)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize="small")


def _curves(scored: ScoredTable) -> Figure:
    figure, panels = _panels(scored, scored.table.tasks)
    for task, axes in zip(scored.table.tasks, panels, strict=False):
        for name, style in _styles(scored).items():
            points = scored.table.methods[name].points.get(task)
            if points and scored.best[task]:
                tpf, height = area_curve(points, scored.best[task])
                axes.fill_between(tpf, height, alpha=0.08, color=style["color"])
                axes.plot(tpf, height, label=name, linewidth=1, markersize=4, markevery=range(2, len(tpf)), **style)
        axes.set(title=task, xlabel="tokens per forward", ylabel="weighted accuracy (%)")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    _legend(figure)
    return figure


def _bars(scored: ScoredTable) -> Figure:
    """AUP of every method on every task, and the averages."""
    styles, groups = _styles(scored), [*scored.table.tasks, "average"]
    methods = [method for method in scored.methods if method.name in styles]
    figure = Figure(figsize=(max(6.0, 2.0 * len(groups)), 4.4), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(methods)
    for number, method in enumerate(methods):
        values = [*(method.aup.get(task) for task in scored.table.tasks), method.average]
        places = [place + (number - (len(methods) - 1) / 2) * width for place in range(len(groups))]
        heights = [0.0 if value is None else value for value in values]
        axes.bar(places, heights, width, label=method.name, color=styles[method.name]["color"])
    axes.set_xticks(range(len(groups)), groups)
    axes.set(title=scored.table.title, ylabel="AUP")
    axes.grid(alpha=0.3, axis="y")
    _legend(figure)
    return figure


def _spokes(scored: ScoredTable) -> dict[str, dict[str, float]]:
    """By the name of a spoke, each method's figure: AUP by task, or where that would be no area, of each task AUP, and
    accuracy and tokens per forward of the fastest point."""
    tasks = scored.table.tasks
    spokes = {task: {each.name: each.aup.get(task) or 0.0 for each in scored.methods} for task in tasks}
    if len(tasks) >= _FEWEST_AXES:
        return spokes
    spokes = {f"{task}\nAUP": values for task, values in spokes.items()}
    for task in tasks:
        fastest = {name: max(each.points[task]) for name, each in scored.table.methods.items() if task in each.points}
        spokes[f"{task}\naccuracy"] = {name: accuracy for name, (_, accuracy) in fastest.items()}
        spokes[f"{task}\nTPF"] = {name: tpf for name, (tpf, _) in fastest.items()}
    return spokes


def _radar(scored: ScoredTable) -> Figure | None:
    """Every figure over the best one of its spoke; None where a spoke has none above 0."""
    spokes, styles = _spokes(scored), _styles(scored)
    most = {label: max(values.get(name, 0.0) for name in styles) for label, values in spokes.items()}
    if not all(most.values()):
        return None
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axes = figure.subplots(subplot_kw={"projection": "polar"})
    angles = [2 * math.pi * number / len(spokes) for number in range(len(spokes))]
    for name, style in styles.items():
        shares = [values.get(name, 0.0) / most[label] for label, values in spokes.items()]
        closed = ([*angles, angles[0]], [*shares, shares[0]])
        axes.plot(*closed, label=name, linewidth=1.2, markersize=4, **style)
        axes.fill(*closed, alpha=0.06, color=style["color"])
    axes.set_xticks(angles, list(spokes))
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["25 %", "", "75 %", "best"], fontsize="x-small")
    axes.tick_params(axis="x", pad=14)
    axes.set_title(scored.table.title, pad=24)
    _legend(figure)
    return figure


def _speed(scored: ScoredTable) -> Figure | None:
    """Accuracy over tokens a second, a panel for every task with speeds."""
    styles = _styles(scored)
    drawn = [task for task in scored.table.tasks if any(task in scored.table.methods[name].tps for name in styles)]
    if not drawn:
        return None
    figure, panels = _panels(scored, drawn)
    for task, axes in zip(drawn, panels, strict=False):
        for name, style in styles.items():
            if points := sorted(scored.table.methods[name].tps.get(task, ())):
                tps, accuracy = zip(*points, strict=True)
                axes.plot(tps, accuracy, label=name, linewidth=1, markersize=6, **style)
        axes.set(title=task, xlabel="tokens per second", ylabel="accuracy (%)")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    _legend(figure)
    return figure
