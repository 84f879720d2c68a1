"""Where a benchmark's verb leaves its report: one way for all of them."""

from __future__ import annotations

from pathlib import Path

from d3llm_ray.benchmark.report import BenchmarkReport, R
from d3llm_ray.config import Settings, to_yaml
from d3llm_ray.report import write_text

SETTINGS_FILE = "benchmark.yaml"


def keep(report: BenchmarkReport[R], settings: Settings, output: Path) -> BenchmarkReport[R]:
    """Write `benchmark.yaml` (the resolved settings), `report.md` and, last of all, `report.json` to `output`."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / SETTINGS_FILE, to_yaml(settings))
    report.write(output)
    return report
