"""What a teacher actor reports, and the Grafana dashboard that reads it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ray.util.metrics import Counter as RayCounter
from ray.util.metrics import Metric

from d3llm_ray.metrics import Rate, TeacherMetrics

DASHBOARD = Path(__file__).parents[1] / "docs" / "grafana-trajectories.json"


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, ...]]:
    """(metric, tag values) to a counter's sum or a gauge's last value."""
    values: Counter[tuple[str, ...]] = Counter()

    def record(metric: Metric, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(metric.info["tag_keys"])
        key = (metric.info["name"].removeprefix("d3llm_teacher_"), *tags.values())
        values[key] = value + (values[key] if isinstance(metric, RayCounter) else 0)

    monkeypatch.setattr(Metric, "_record", record)
    return values


def test_rate_over_a_sliding_window() -> None:
    clock = Clock()
    rate = Rate(window_s=30.0, clock=clock)
    assert rate.per_second() == 0.0
    rate.add(20)
    clock.seconds += 10.0
    assert rate.per_second() == 2.0  # 20 in the 10 s that there are
    rate.add(40)
    clock.seconds += 10.0
    assert rate.per_second() == 3.0  # 60 in 20 s
    clock.seconds += 10.0
    assert rate.per_second() == pytest.approx(40 / 30)  # the first 20 are 30 s old
    clock.seconds += 9.0
    assert rate.per_second() == pytest.approx(40 / 30)
    clock.seconds += 1.0
    assert rate.per_second() == 0.0


def test_teacher_metrics(recorded: Counter[tuple[str, ...]]) -> None:
    clock = Clock()
    metrics = TeacherMetrics("tiny", clock)
    clock.seconds += 4.0
    metrics.finished(True, tokens=20, forwards=30, attempt=2)
    metrics.finished(False, tokens=10, forwards=15, attempt=4)
    metrics.finished(None, tokens=0, forwards=1, attempt=0)
    metrics.finished(True, tokens=6, forwards=7, attempt=2)
    metrics.failed()
    for active, waiting in ((5, 3), (4, 0)):
        metrics.stepped(active, waiting)
    assert dict(recorded) == {
        ("rows", "tiny", "correct", "2"): 2,
        ("rows", "tiny", "wrong", "4"): 1,
        ("rows", "tiny", "unjudged", "0"): 1,
        ("tokens", "tiny"): 36,
        ("row_forwards", "tiny"): 53,
        ("retries", "tiny"): 8,
        ("errors", "tiny"): 1,
        ("forwards", "tiny"): 2,
        ("active", "tiny"): 4,
        ("queue", "tiny"): 0,
        ("rows_per_second", "tiny"): 1.0,  # 4 rows in 4 s
        ("tokens_per_second", "tiny"): 9.0,
    }


def test_the_dashboard_shows_every_series_of_a_teacher_and_no_other() -> None:
    """Ray exports a counter as `ray_<name>_total` and a gauge as `ray_<name>`, with the actor as `WorkerId`."""
    metrics = [value for value in vars(TeacherMetrics("t")).values() if isinstance(value, Metric)]
    exported = {f"ray_{metric.info['name']}{'_total' * isinstance(metric, RayCounter)}" for metric in metrics}
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    assert {name for expression in expressions for name in re.findall(r"\bray_\w+", expression)} == exported
    tags = {tag for metric in metrics for tag in metric.info["tag_keys"]}
    matched = {tag for expression in expressions for tag in re.findall(r"(\w+)\s*(?:=~|!=|=)", expression)}
    grouped = {tag for expression in expressions for tag in re.findall(r"(?:by|ignoring) \((\w+)\)", expression)}
    assert matched | grouped == tags


def test_the_dashboard_reads_the_data_source_that_the_user_chooses() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    places = [variables["teacher"], *dashboard["panels"]]
    places += [target for panel in dashboard["panels"] for target in panel["targets"]]
    assert {place["datasource"]["uid"] for place in places} == {"${datasource}"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
