"""The picture of a run: which curves are drawn, from which numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from d3llm_ray.distillation.training import plots as plot
from d3llm_ray.distillation.training.plots import plot_loss, smoothed

Curves = dict[str, tuple[list[float], list[float]]]


def line_of(step: int) -> dict[str, Any]:
    """A full line of the d3LLM objective; every second step was validated."""
    line: dict[str, Any] = {"step": step, "epoch": 0, "window": 16 + step, "noise_floor": step / 10, "lr": 1 / step}
    line |= {"loss": 2 / step, "ce": 3.0, "complement": 1.0, "certainty": 0.5, "right": 0.75, "mask_ratio": 0.5}
    line |= {"grad_norm": 1.5, "samples_per_second": 9.0, "steps_per_second": 3.0, "memory_gib": 1.0}
    return line | ({"val_loss": 1.0, "val_accuracy": 50.0, "val_tpf": 2.0} if step % 2 == 0 else {})


def drawn(lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[Curves]:
    """The labelled curves of every axis, in drawing order."""
    figures: list[Figure] = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: figures.append(figure))
    plot_loss(lines, Path("unused.png"))
    return [
        {
            str(curve.get_label()): (np.asarray(curve.get_xdata()).tolist(), np.asarray(curve.get_ydata()).tolist())
            for curve in axes.get_lines()
            if not str(curve.get_label()).startswith("_")
        }
        for axes in figures[0].axes
    ]


def test_every_figure_has_its_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn([line_of(step) for step in (1, 2, 3, 4)], monkeypatch)
    assert [set(curves) for curves in axes] == [
        {"loss", "cross-entropy", "cross-entropy, complement", "certainty forcing (entropy)", "validation: loss"},
        {"supervised tokens right", "validation: problems solved"},
        {"gradient norm"},
        {"window"},
        {"validation: tokens per forward"},
        {"learning rate"},
        {"noise floor", "mask ratio"},
    ]
    assert axes[0]["loss"] == ([1, 2, 3, 4], [2.0, 1.0, 2 / 3, 0.5])
    assert axes[0]["validation: loss"] == ([2, 4], [1.0, 1.0])
    assert axes[1]["supervised tokens right"][1] == [75.0] * 4  # in percent, on one axis
    assert axes[1]["validation: problems solved"] == ([2, 4], [50.0, 50.0])
    assert axes[3]["window"] == ([1, 2, 3, 4], [17, 18, 19, 20])


def test_an_objective_s_own_figures_are_losses_and_missing_ones_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"step": step, "loss": 1.0, "divergence": 0.5, "note": "text"} for step in (1, 2)]
    assert [set(curves) for curves in drawn(lines, monkeypatch)] == [{"loss", "divergence"}]
    lines[0]["lr"] = 0.1  # only one line has it, and no gradient norm is beside it
    assert [set(curves) for curves in drawn(lines, monkeypatch)] == [{"loss", "divergence"}, set(), {"learning rate"}]


def test_long_curves_are_smoothed_and_schedules_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"step": step, "loss": float(step % 2), "window": step % 2} for step in range(1, 201)]
    axes = drawn(lines, monkeypatch)
    assert axes[0]["loss"][1][100] == pytest.approx(5 / 11)  # 11 neighbours, 5 of them odd steps
    assert axes[1]["window"][1][:4] == [1, 0, 1, 0]


@pytest.mark.parametrize("count", [60, 101, 400])
def test_smoothing_is_a_mean_of_neighbours(count: int) -> None:
    values = np.random.default_rng(0).random(count)
    reach = round(count * 0.05 / 2)
    slow = [np.mean(values[max(0, n - reach) : n + reach + 1]) for n in range(count)]
    np.testing.assert_allclose(smoothed(values), slow)


def test_one_step_makes_a_picture(tmp_path: Path) -> None:
    plot_loss([line_of(1)], tmp_path / "loss.png")
    pixels = imread(tmp_path / "loss.png")
    assert pixels.shape[0] > 500 and pixels.std() > 0.01
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
