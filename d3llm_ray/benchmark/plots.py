"""Tokens a second over batch size, a refresh's cost over length, and a server's latency over its load."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from d3llm_ray.benchmark.refresh import RefreshRow
from d3llm_ray.benchmark.report import BenchmarkReport
from d3llm_ray.benchmark.rows import BenchmarkRow
from d3llm_ray.benchmark.serving_rows import ServingRow
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


def plot_refresh(report: BenchmarkReport[RefreshRow], path: Path) -> None:
    """What a refresh adds to a forward over the prompt's length, by interval; a line for each block size."""
    intervals = report.rows[0].intervals
    figure = Figure(figsize=(4 * len(intervals), 4), layout="constrained")
    panels = figure.subplots(1, len(intervals), squeeze=False)[0]
    for axes, interval in zip(panels, intervals, strict=True):
        for index, size in enumerate(dict.fromkeys(row.block_size for row in report.rows)):
            rows = sorted((row for row in report.rows if row.block_size == size), key=lambda row: row.prompt_tokens)
            lengths, color = [row.prompt_tokens for row in rows], f"C{index % 10}"
            axes.plot(lengths, [row.ms.added(interval) for row in rows], "o-", color=color, label=f"block {size}")
            axes.plot(lengths, [row.flops.added(interval) for row in rows], "--", color=color, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set(title=f"every {interval} forwards", xlabel="prompt (tokens)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("added to a forward (%), dashed: FLOPs")
    panels[0].legend(fontsize="small")
    figure.suptitle(f"{report.rows[0].model}, canvas {report.rows[0].max_tokens}")
    save_figure(figure, path)


def plot_latency(report: BenchmarkReport[ServingRow], path: Path) -> None:
    """Seconds to the first text and to the end over the load: median, and up to the 99th percentile; closed, open."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    kinds = {"closed": "clients", "open": "requests a second"}
    shown = [kind for kind in kinds if any(row.kind == kind for row in report.rows)]
    for place, kind in enumerate(shown, start=1):
        axes = figure.add_subplot(1, len(shown), place)
        rows = [row for row in report.rows if row.kind == kind]
        for what, color in (("first_s", "C0"), ("total_s", "C1")):
            found = [(row.load, getattr(row, what)) for row in rows if getattr(row, what) is not None]
            if not found:
                continue
            loads = [load for load, _ in found]
            p50, p90, p99 = ([seconds[name] for _, seconds in found] for name in ("p50", "p90", "p99"))
            label = {"first_s": "first text", "total_s": "whole answer"}[what]
            axes.plot(loads, p50, marker="o", color=color, label=f"{label}: median, p90, p99")
            axes.plot(loads, p90, linestyle="--", linewidth=0.8, color=color)
            axes.fill_between(loads, p50, p99, color=color, alpha=0.15)
        axes.set(title=f"{report.plan['model']}, {kind} load", xlabel=kinds[kind], ylabel="seconds", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save_figure(figure, path)
