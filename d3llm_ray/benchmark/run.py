"""The verbs `benchmark`, `benchmark step`, `benchmark host` and `benchmark refresh`: measure, then write the report."""

from __future__ import annotations

from d3llm_ray.benchmark.files import begin, check, keep
from d3llm_ray.benchmark.host import HostRow, measure_host
from d3llm_ray.benchmark.measure import benchmark
from d3llm_ray.benchmark.refresh import RefreshRow, measure_refresh
from d3llm_ray.benchmark.report import BenchmarkReport
from d3llm_ray.benchmark.rows import BenchmarkRow
from d3llm_ray.benchmark.settings import (
    BenchmarkSettings,
    HostBenchmarkSettings,
    RefreshBenchmarkSettings,
    StepBenchmarkSettings,
)
from d3llm_ray.benchmark.step import measure_step
from d3llm_ray.benchmark.step_rows import StepRow
from d3llm_ray.output_folder import sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.report import can_plot


@sole_writer
def run(settings: BenchmarkSettings, progress: Progress | None = None) -> BenchmarkReport[BenchmarkRow]:
    """Measure decoding, and write the report, with a plot beside it where matplotlib is installed.

    Raises:
        InputError: a plan that cannot be carried out, or a folder that is not ours, before any weight is read or made.
    """
    check(settings, settings.output)
    report = benchmark(settings.plan(), progress)
    if can_plot(plot := settings.output / "tokens_per_second.png"):  # seldom on a machine rented for its GPU
        from d3llm_ray.benchmark.plots import plot_report

        begin(settings, settings.output)
        plot_report(report, plot)
    return keep(report, settings, settings.output)


@sole_writer
def run_step(settings: StepBenchmarkSettings) -> BenchmarkReport[StepRow]:
    """Measure an optimizer step, and write the report.

    Raises:
        InputError: a plan that cannot be carried out, or a folder that is not ours, before any weight is read or made.
        WorkError: a loss that is not finite.
    """
    check(settings, settings.output)
    return keep(measure_step(settings.plan()), settings, settings.output)


@sole_writer
def run_host(settings: HostBenchmarkSettings, progress: Progress | None = None) -> BenchmarkReport[HostRow]:
    """Measure the host's share of a step, and write the report.

    Raises:
        InputError: a plan that cannot be carried out, or a folder that is not ours.
    """
    check(settings, settings.output)
    return keep(measure_host(settings.plan(), progress), settings, settings.output)


@sole_writer
def run_refresh(settings: RefreshBenchmarkSettings, progress: Progress | None = None) -> BenchmarkReport[RefreshRow]:
    """Measure what a refresh costs, and write the report, with a plot beside it where matplotlib is installed.

    Raises:
        InputError: a plan that cannot be carried out, or a folder that is not ours, before any weight is made.
        WorkError: a block size with which nothing is ever cached.
    """
    check(settings, settings.output)
    report = measure_refresh(settings.plan(), progress)
    if can_plot(plot := settings.output / "refresh.png"):
        from d3llm_ray.benchmark.plots import plot_refresh

        begin(settings, settings.output)
        plot_refresh(report, plot)
    return keep(report, settings, settings.output)
