"""Histograms of the reveals, and the picture of one trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.image import AxesImage

from d3llm_ray.report import save_figure
from d3llm_ray.trajectories.play import Unmasking
from d3llm_ray.trajectories.reveals import Histogram

PANEL = 64  # positions side by side; a longer canvas is broken into lines
LABEL_LENGTH = 14  # characters of a token that are shown
MASKED_COLOR = "0.93"
COLORS = "viridis"
FADED = 0.35  # opacity of a position after the forward that revealed it


def plot_histograms(histograms: Sequence[Histogram], path: Path) -> None:
    """Draw the histograms side by side, in percent of their positions, and write them as a PNG."""
    figure = Figure(figsize=(4 * len(histograms), 3.2), layout="constrained")
    panels = figure.subplots(1, len(histograms), squeeze=False)[0]
    for axes, histogram in zip(panels, histograms, strict=True):
        widths, shares = np.diff(histogram.edges), 100 * histogram.counts / histogram.counts.sum()
        axes.bar(histogram.edges[:-1], shares, widths, align="edge", edgecolor="white", linewidth=0.5)
        axes.set_xlabel(f"{histogram.title}{f' ({histogram.unit})' if histogram.unit else ''}")
        axes.grid(alpha=0.3, axis="y")
        axes.set_axisbelow(True)
    panels[0].set_ylabel("positions (%)")
    save_figure(figure, path)


def plot_unmasking(unmasking: Unmasking, path: Path) -> None:
    """Draw positions (across) over forwards (down) and write them as a PNG.

    A position is grey while it is masked, coloured by its entropy in the forward that reveals it, and faded after.
    White lines separate the blocks. Canvases of more than 64 positions continue in the panels below, each with the
    forwards that reveal something in it.
    """
    canvas = unmasking.steps.size
    spans = [slice(start, min(start + PANEL, canvas)) for start in range(0, canvas, PANEL)]
    lengths = [int(np.ptp(unmasking.steps[span])) + 1 for span in spans]
    heights = [1.2 + min(max(0.07 * length, 1.0), 4.5) for length in lengths]  # inches, labels included
    figure = Figure(figsize=(11, 0.4 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(spans), 1, squeeze=False, height_ratios=heights)[:, 0]
    labels = _labels(unmasking)
    for axes, span in zip(panels, spans, strict=True):
        image = _draw_reveals(axes, unmasking, span)
        axes.set_xticks(range(span.start, span.stop), labels[span], rotation=90, fontsize=7, parse_math=False)
        axes.set_ylabel("forward")
    known = "" if unmasking.entropy is not None else ", entropy unknown"
    panels[0].set_title(f"{unmasking.prompt_id}: {canvas} positions in {unmasking.forwards} forwards{known}")
    if unmasking.entropy is not None:
        aspect = 8 * sum(heights)  # as wide whatever the number of panels
        figure.colorbar(image, ax=panels.tolist(), label="entropy at reveal (nats)", pad=0.01, aspect=aspect)
    save_figure(figure, path)


def _draw_reveals(axes: Axes, unmasking: Unmasking, span: slice) -> AxesImage:
    steps = unmasking.steps[span]
    forward = np.arange(steps.min(), steps.max() + 1)[:, None]
    entropy = np.zeros(unmasking.steps.size) if unmasking.entropy is None else unmasking.entropy
    opacity = np.where(forward == steps, 1.0, np.where(forward > steps, FADED, 0.0))  # [forward, position]
    image = axes.imshow(
        np.broadcast_to(entropy[span], opacity.shape),
        alpha=opacity,
        cmap=COLORS,
        norm=Normalize(0.0, max(float(entropy.max()), 1e-3)),
        aspect="auto",
        interpolation="nearest",
        extent=(span.start - 0.5, span.stop - 0.5, steps.max() + 1.5, steps.min() + 0.5),
    )
    axes.axvspan(span.start - 0.5, span.stop - 0.5, color=MASKED_COLOR, linewidth=0, zorder=-1)
    axes.set_xlim(right=span.start + PANEL - 0.5 if span.start else None)  # the last panel's cells are as wide
    for boundary in range(0, unmasking.steps.size, unmasking.block_size):
        if span.start < boundary < span.stop:
            axes.axvline(boundary - 0.5, color="white", linewidth=1.5)
    return image


def _labels(unmasking: Unmasking) -> list[str]:
    """Tick labels: every token's text, or its id where the font cannot draw it; a run of special tokens has one."""
    drawable: Any = get_font(findfont(FontProperties())).get_charmap()
    labels = []
    for position, (text, token) in enumerate(zip(unmasking.texts, unmasking.token_ids, strict=True)):
        text = text.strip(" ").replace("\n", "↵") or "␣"
        text = text if len(text) <= LABEL_LENGTH else f"{text[: LABEL_LENGTH - 1]}…"
        repeated = position > 0 and unmasking.special[position] and token == unmasking.token_ids[position - 1]
        known = all(ord(letter) in drawable for letter in text)
        labels.append("" if repeated else text if known else f"#{token}")
    return labels
