"""Rows a second of a teacher: the report of every way, with stand-ins for what takes a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from d3llm_ray.benchmark import trajectories as benchmark
from d3llm_ray.benchmark.trajectories import TrajectoryBenchmarkSettings
from d3llm_ray.config import build
from d3llm_ray.progress import Progress

SIZE = "max_batch_size"


def test_the_report_of_every_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """8 prompts: 4 s one by one, 2 s in a batch, jobs 2.5 and 1 s, of which the last has one row that differs."""
    seconds = {1: 4.0, 4: 2.0}
    rows: list[Any] = [([n], [0], 1) for n in range(8)]

    def loop(_settings: Any, _source: Any, prompts: Any, batch_size: int) -> tuple[float, list[Any]]:
        assert len(prompts) == 8
        return seconds[batch_size], rows

    def job(_settings: Any, output: str, actors: int, _progress: Progress) -> tuple[float, list[Any]]:
        assert Path(output).parent.parent == tmp_path / "out"
        return {1: 2.5, 2: 1.0}[actors], rows if actors == 1 else [*rows[:-1], ([9], [1], 2)]

    monkeypatch.setattr(benchmark, "_loop", loop)
    monkeypatch.setattr(benchmark, "_job", job)
    values = {"count": 8, "actors": 2, SIZE: 4, "output": str(tmp_path / "out")}
    text = str(benchmark.run(build(TrajectoryBenchmarkSettings, values), Progress(quiet=True)))
    found = json.loads(text.splitlines()[-1])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["benchmark.yaml", "report.json", "report.md"]
    assert found["benchmark"] == "trajectories" and found["plan"]["count"] == 8
    rates = {row["name"]: row["per_second"] for row in found["rows"]}
    assert rates == {"single": 2.0, "loop": 4.0, "job of 1": 3.2, "job of 2": 8.0}
    assert [row["identical_rows"] for row in found["rows"]] == [8, 8, 8, 7]
    assert {ratio["what"]: ratio["value"] for ratio in found["ratios"]} == {
        "single": 0.5,
        "job of 1": 0.8,
        "job of 2": 2.0,
    }
    assert "| job of 2 | 8.00 | 8.00 | 8.00 | 7 |" in text
