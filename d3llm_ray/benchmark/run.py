"""The verb `benchmark`: measure, then write the report and its plot."""

from __future__ import annotations

from importlib.util import find_spec

from d3llm_ray.benchmark.measure import benchmark
from d3llm_ray.benchmark.report import Report
from d3llm_ray.benchmark.settings import BenchmarkSettings
from d3llm_ray.config import to_yaml
from d3llm_ray.progress import Progress
from d3llm_ray.report import write_text


def run(settings: BenchmarkSettings, progress: Progress | None = None) -> Report:
    """Measure and write; returns the report.

    Files in `settings.output`: `benchmark.yaml` (these settings), `report.md`, `tokens_per_second.png` (where
    matplotlib is installed) and, last of all, `report.json`.

    Raises:
        InputError: a plan that cannot be carried out, before any weight is read or made.
    """
    report = benchmark(settings.plan(), progress)
    settings.output.mkdir(parents=True, exist_ok=True)
    write_text(settings.output / "benchmark.yaml", to_yaml(settings))
    if find_spec("matplotlib") is not None:  # not needed to measure, and seldom on a machine rented for its GPU
        from d3llm_ray.benchmark.plots import plot_report

        plot_report(report, settings.output / "tokens_per_second.png")
    report.write(settings.output)
    return report
