"""The loss curves of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_loss(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss and its parts over the steps, and the curriculum below, from the lines of `metrics.jsonl`."""
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(7, 6), layout="constrained")
    losses, curriculum = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    labels = {"loss": "weighted loss", "ce": "CE, masked", "complement": "CE, complement", "entropy": "entropy"}
    for name, label in labels.items():
        losses.plot(steps, [line[name] for line in lines], label=label, linewidth=1.6 if name == "loss" else 0.9)
    losses.set_ylabel("nats a token")
    losses.set_ylim(bottom=0)
    losses.legend(frameon=False)
    curriculum.plot(steps, [line["window"] for line in lines], color="tab:gray")
    curriculum.set_ylabel("window (tokens)", color="tab:gray")
    curriculum.set_xlabel("optimizer step")
    ratio = curriculum.twinx()
    ratio.plot(steps, [line["mask_ratio"] for line in lines], color="tab:olive", linewidth=0.9)
    ratio.set_ylabel("mask ratio", color="tab:olive")
    ratio.set_ylim(0, 1)
    figure.savefig(path, dpi=120)
