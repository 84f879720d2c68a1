"""Where a benchmark's verb leaves its report: one way for all of them."""

from __future__ import annotations

from pathlib import Path

from d3llm_ray.benchmark.report import BenchmarkReport, R
from d3llm_ray.config import Settings
from d3llm_ray.output_folder import check_folder, claim

SETTINGS_FILE = "benchmark.yaml"


def check(settings: Settings, output: Path) -> None:
    """`InputError` where the report would go into a folder that is not a benchmark's of this kind."""
    check_folder(output, SETTINGS_FILE, type(settings))


def begin(settings: Settings, output: Path) -> None:
    """Make the folder for a measurement that works inside it, with the settings; `InputError` likewise."""
    claim(output, SETTINGS_FILE, settings)


def keep(report: BenchmarkReport[R], settings: Settings, output: Path) -> BenchmarkReport[R]:
    """Write `benchmark.yaml` (the resolved settings), `report.md` and, last of all, `report.json` to `output`."""
    claim(output, SETTINGS_FILE, settings)
    report.write(output)
    return report
