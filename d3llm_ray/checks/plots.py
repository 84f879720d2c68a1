"""Pictures of a check: gains with what they lie within, accuracy and AUP over a swept threshold, decoders as points."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from d3llm_ray.checks.report import FIGURES, CheckReport
from d3llm_ray.checks.transfer_report import TransferReport
from d3llm_ray.report import save_figure


def plot_check(report: CheckReport, path: Path) -> None:
    """Write the picture that fits the check's figure."""
    figure = _curve(report) if report.check.figure == "aup" else _gains(report)
    figure.suptitle(report.check.question, fontsize="medium")
    save_figure(figure, path)


def plot_transfer(report: TransferReport, path: Path) -> None:
    """Accuracy over tokens per forward of every decoder, with Wilson's intervals."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in report.rows:
        reach = [[row.accuracy - row.accuracy_low], [row.accuracy_high - row.accuracy]]
        axes.errorbar([row.tpf], [row.accuracy], yerr=reach, fmt="o", capsize=4, label=row.decoder)
    axes.set(xlabel="tokens per forward", ylabel="accuracy (%)", title=f"{report.rows[0].model}, {report.task}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path)


def _gains(report: CheckReport) -> Figure:
    figure = Figure(figsize=(7.5, 1.6 + 0.7 * len(report.gains)), layout="constrained")
    axes = figure.subplots()
    gains = [report.gain(each) for each in report.gains]
    labels = [variant.label for variant in report.check.variants[1:]]
    places = list(range(len(gains)))
    values = [gain.percent for gain in gains]
    reach = ([gain.percent - gain.low for gain in gains], [gain.high - gain.percent for gain in gains])
    axes.errorbar(values, places, xerr=reach, fmt="o", capsize=4, label="measured")
    if report.check.gain is not None:
        axes.axvline(report.check.gain, color="C1", linestyle="--", label="published")
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_yticks(places, labels)
    axes.set_ylim(-0.6, len(gains) - 0.4)
    name = FIGURES[report.check.figure]
    axes.set(xlabel=f"{name} against {report.check.variants[0].label} (%)", title=f"{report.model}, {report.task}")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize="small")
    return figure


def _curve(report: CheckReport) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [each[0] for each in report.rows]
    accuracy = [row.accuracy for row in rows]
    reach = ([row.accuracy - row.accuracy_low for row in rows], [row.accuracy_high - row.accuracy for row in rows])
    left.errorbar([row.tpf for row in rows[1:]], accuracy[1:], yerr=[each[1:] for each in reach], fmt="o-", capsize=3)
    left.axhline(accuracy[0], color="0.5", linestyle="--", label=report.check.variants[0].label)
    for row, variant in zip(rows[1:], report.check.variants[1:], strict=True):
        left.annotate(
            variant.label, (row.tpf, row.accuracy), textcoords="offset points", xytext=(5, 6), fontsize="x-small"
        )
    left.set(xlabel="tokens per forward", ylabel="accuracy (%)", title=f"{report.model}, {report.task}")
    left.legend(fontsize="small")
    labels = [variant.label for variant in report.check.variants[1:]]
    right.plot(range(len(labels)), report.aups[0], "o-")
    right.set_xticks(range(len(labels)), labels)
    right.set(xlabel="entropy threshold", ylabel="AUP", title="AUP of the anchor and one setting")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure
