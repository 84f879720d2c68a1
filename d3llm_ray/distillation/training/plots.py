"""A run as a picture: losses, validation, gradients and the curriculum over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from d3llm_ray.distillation.training.trackers import CURRICULUM, SPEED, VALIDATION
from d3llm_ray.report import save_figure

Lines = Sequence[dict[str, Any]]

_LABELS = {
    "ce": "cross-entropy",
    "complement": "cross-entropy, complement",
    "certainty": "certainty forcing (entropy)",
    "right": "supervised tokens right",
    "val_loss": "validation: loss",
    "val_accuracy": "validation: problems solved",
    "val_tpf": "validation: tokens per forward",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "noise_floor": "noise floor",
    "mask_ratio": "mask ratio",
}
_NOT_LOSSES = {"step", "loss", "right", "grad_norm", *CURRICULUM, *SPEED}
_SHARES = {"right"}  # drawn in percent, beside accuracy
_SCHEDULED = {"window", "noise_floor", "lr"}  # not measured: drawn as they are
_SMOOTHED_FROM = 60  # points
_SMOOTHING = 0.05  # share of the points that a smoothed one is the mean of


class _Panel(NamedTuple):
    left: tuple[str, ...]  # figures on the left axis
    quantity: str
    right: tuple[str, ...] = ()
    other_quantity: str = ""


def plot_loss(lines: Lines, path: Path) -> None:
    """Draw the lines of `metrics.jsonl` as a PNG; a figure that no line has is left out.

    From above: the loss, the objective's parts of it and the validation loss; percent of right tokens and problems,
    with tokens per forward; gradient norm and learning rate; window, noise floor and mask ratio. Long curves are
    smoothed, with what was measured behind them.
    """
    names = list(dict.fromkeys(name for line in lines for name, value in line.items() if not isinstance(value, str)))
    parts = [name for name in names if name not in _NOT_LOSSES and not name.startswith(VALIDATION)]
    panels = [
        _Panel(("loss", *parts, "val_loss"), "nats a token"),
        _Panel(("right", "val_accuracy"), "percent", ("val_tpf",), "tokens per forward"),
        _Panel(("grad_norm",), "gradient norm", ("lr",), "learning rate"),
        _Panel(("window",), "window (tokens)", ("noise_floor", "mask_ratio"), "mask ratio"),
    ]
    panels = [panel for panel in panels if not set(names).isdisjoint(panel.left + panel.right)]
    heights = [3.2, *[1.4] * (len(panels) - 1)]
    figure = Figure(figsize=(8, 1.0 + 1.15 * sum(heights)), layout="constrained")
    rows = figure.subplots(len(panels), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axes, panel in zip(rows, panels, strict=True):
        curves = _draw(axes, lines, panel.left, panel.quantity, 0)
        if not set(names).isdisjoint(panel.right):
            curves += _draw(axes.twinx(), lines, panel.right, panel.other_quantity, len(panel.left))
        axes.grid(alpha=0.3)
        if curves:
            axes.legend(
                handles=curves, fontsize="small", frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1)
            )
    rows[-1].set_xlabel("optimizer step")
    save_figure(figure, path)


def _draw(axes: Axes, lines: Lines, names: Sequence[str], quantity: str, first_color: int) -> list[Artist]:
    """Draw those of the figures that there are; returns what a legend shows."""
    curves: list[Artist] = []
    for index, name in enumerate(names):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if not points:
            continue
        steps, values = np.array(points, dtype=np.float64).T
        if name in _SHARES:
            values = 100 * values
        style: dict[str, Any] = {"color": f"C{(first_color + index) % 10}", "linewidth": 1.8 if name == "loss" else 1.2}
        if name.startswith(VALIDATION):
            style |= {"marker": "o", "markersize": 4, "linestyle": ":"}
        elif name not in _SCHEDULED and len(points) >= _SMOOTHED_FROM:
            axes.plot(steps, values, color=style["color"], linewidth=0.6, alpha=0.3)
            values = smoothed(values)
        curves += axes.plot(steps, values, label=_LABELS.get(name, name), **style)
    if not curves:
        axes.set_yticks([])
        return []
    axes.set_ylabel(quantity)
    if quantity != "percent":
        axes.set_ylim(bottom=0)
    return curves


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of every value's neighbourhood, narrower towards both ends: [N] -> [N]."""
    reach = max(1, round(len(values) * _SMOOTHING / 2))
    sums = np.concatenate(([0.0], np.cumsum(values)))
    here = np.arange(len(values))
    first, behind = np.maximum(here - reach, 0), np.minimum(here + reach + 1, len(values))
    means: NDArray[np.float64] = (sums[behind] - sums[first]) / (behind - first)
    return means
