"""Tokens a second over batch size."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from d3llm_ray.benchmark.report import BenchmarkReport
from d3llm_ray.benchmark.rows import BenchmarkRow
from d3llm_ray.report import save_figure


def plot_report(report: BenchmarkReport[BenchmarkRow], path: Path) -> None:
    """One line for each decoder, suffix mode and canvas, its ceiling dashed; bars are the extremes of the rounds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    assert report.roofline is not None  # decoding has one
    curves = list(dict.fromkeys((row.label, row.max_tokens) for row in report.rows))
    for index, curve in enumerate(curves):
        rows = [row for row in report.rows if (row.label, row.max_tokens) == curve]
        rows.sort(key=lambda row: row.batch_size)
        sizes, tps = [row.batch_size for row in rows], [row.tps for row in rows]
        below = [row.tps - row.tps_low for row in rows]
        above = [row.tps_high - row.tps for row in rows]
        color = f"C{index % 10}"
        label = f"{curve[0]}, canvas {curve[1]}"
        axes.errorbar(sizes, tps, yerr=[below, above], label=label, color=color, marker="o", linewidth=1, capsize=3)
        axes.plot(sizes, [row.roofline_tps for row in rows], linestyle="--", linewidth=0.8, color=color)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({row.batch_size for row in report.rows})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    first = report.rows[0]
    axes.set(
        title=f"{first.model}, {first.task} (dashed: roofline, {report.roofline.name})",
        xlabel="batch size",
        ylabel="tokens a second",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path)
