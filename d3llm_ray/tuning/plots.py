"""Pictures of a search: accuracy over speed with the Pareto front, and the heat map of two parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d3llm_ray.report import save_figure
from d3llm_ray.tuning.objective import SearchObjective, TuneTrial, best_trial, finished, pareto_front
from d3llm_ray.tuning.space import SearchSpace, ValueChoice

BANDWIDTH = 0.12  # of the heat map's Gaussian kernel, as a share of an axis
_CELLS = 60
_SPEEDS = {"tpf": "tokens per forward", "tps": "tokens per second"}


def plot_trials(path: Path, space: SearchSpace, objective: SearchObjective, trials: Sequence[TuneTrial]) -> None:
    """Accuracy (percent) over speed of every trial, with the Pareto front, the anchor and the choice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    speed = objective.speed
    best, front, whole = best_trial(trials), pareto_front(trials, speed), finished(trials)
    stopped = [trial for trial in trials if trial.stopped]
    if stopped:
        places = [getattr(trial, speed) for trial in stopped], [trial.accuracy for trial in stopped]
        axes.scatter(*places, color="C7", marker="x", label="stopped: what is expected")
    axes.scatter([getattr(t, speed) for t in whole], [t.accuracy for t in whole], color="C0", label="trials")
    steps = [getattr(t, speed) for t in front], [t.accuracy for t in front]
    axes.step(*steps, where="pre", color="C0", alpha=0.5, label="Pareto front")
    if speed == "tpf":
        axes.scatter(*objective.anchor, color="C7", marker="s", label="anchor (vanilla)")
    own = next((trial for trial in whole if trial.values == space.default_point()), None)
    if own is not None:
        label = f"{space.decoder}, its own settings"
        axes.scatter(getattr(own, speed), own.accuracy, color="C1", marker="D", label=label)
    chosen = getattr(best, speed), best.accuracy
    axes.scatter(*chosen, s=160, facecolors="none", edgecolors="C3", linewidths=2, label="chosen")
    axes.set(title=f"{space.decoder}: {len(trials)} trials", xlabel=_SPEEDS[speed], ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path)


def interpolated(
    places: npt.NDArray[np.float64], values: npt.NDArray[np.float64], at: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Mean of `values` (n) weighted by a Gaussian kernel of the distance from `places` (n, 2) to `at` (m, 2), in a unit
    square (Nadaraya and Watson)."""
    squares = ((at[:, None, :] - places[None, :, :]) ** 2).sum(-1) / (2 * BANDWIDTH**2)  # (m, n)
    weights = np.exp(squares.min(1, keepdims=True) - squares)  # the nearest counts however far it is
    return np.asarray((weights * values).sum(1) / weights.sum(1))


def plot_heat_map(path: Path, space: SearchSpace, trials: Sequence[TuneTrial], names: tuple[str, str]) -> None:
    """Score and accuracy over two parameters, interpolated from the trials, which are drawn as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    horizontal, vertical = (_Axis(space, name) for name in names)
    places = np.array([[horizontal.place(trial.values), vertical.place(trial.values)] for trial in trials])
    cells = np.stack(np.meshgrid(horizontal.cells, vertical.cells), -1).reshape(-1, 2)
    for axes, quantity in zip(figure.subplots(1, 2), ("score", "accuracy"), strict=True):
        values = np.array([getattr(trial, quantity) for trial in trials])
        shown = interpolated(places, values, cells).reshape(len(vertical.cells), len(horizontal.cells))
        edges = horizontal.edges, vertical.edges
        figure.colorbar(axes.pcolormesh(*edges, shown), ax=axes, label=f"{quantity}{' (%)' * (quantity == 'accuracy')}")
        for stopped, style in ((False, {"color": "black"}), (True, {"facecolors": "none", "edgecolors": "black"})):
            dots = places[[trial.stopped == stopped for trial in trials]]
            axes.scatter(dots[:, 0], dots[:, 1], s=18, **style)
        best = best_trial(trials)
        chosen = horizontal.place(best.values), vertical.place(best.values)
        axes.scatter(*chosen, s=160, facecolors="none", edgecolors="C3", linewidths=2)
        axes.set(title=f"{quantity}, interpolated from the trials", xlabel=names[0], ylabel=names[1])
        axes.set_xticks(*horizontal.ticks)
        axes.set_yticks(*vertical.ticks)
    save_figure(figure, path)


class _Axis:
    """A parameter on the way from 0 to 1: a choice's values at equal distances, in the order of the space."""

    def __init__(self, space: SearchSpace, name: str) -> None:
        self._name, parameter = name, space.parameters[name]
        if isinstance(parameter, ValueChoice):
            self._values: list[Any] | None = list(parameter.values)
            count = len(self._values)
            self.cells = (np.arange(count) + 0.5) / count
            self.edges = np.linspace(0, 1, count + 1)
            self.ticks = self.cells, [str(value) for value in self._values]
            return
        self._values = None
        self._log = parameter.type == "log_float"
        self._ends = [np.log(end) if self._log else end for end in (parameter.low, parameter.high)]
        self.edges = np.linspace(0, 1, _CELLS + 1)
        self.cells = (self.edges[1:] + self.edges[:-1]) / 2
        at = np.linspace(0, 1, 5)
        shown = self._ends[0] + at * (self._ends[1] - self._ends[0])
        self.ticks = at, [f"{value:.3g}" for value in (np.exp(shown) if self._log else shown)]

    def place(self, values: dict[str, Any]) -> float:
        value = values[self._name]
        if self._values is not None:
            return float(self.cells[self._values.index(value)])
        low, high = self._ends
        return float(((np.log(value) if self._log else value) - low) / (high - low))
