"""The Grafana dashboard of a served model reads the series that a replica exports, and all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ray.util.metrics import Counter, Gauge, Histogram, Metric

from d3llm_ray.metrics import ServingMetrics

DOCS = Path(__file__).parents[2] / "docs"
OF_SERVE = {"deployment", "replica", "application"}  # tags that Serve adds in a replica


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DOCS / "grafana-serving.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def metrics() -> list[Metric]:
    return [value for value in vars(ServingMetrics("m")).values() if isinstance(value, Metric)]


def exported(metric: Metric) -> set[str]:
    """Prometheus names, as Ray makes them."""
    endings = {Counter: ("_total",), Gauge: ("",), Histogram: ("_bucket", "_sum", "_count")}
    (kind,) = [kind for kind in endings if isinstance(metric, kind)]
    return {f"ray_{metric.info['name']}{ending}" for ending in endings[kind]}


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_every_series_is_shown_and_no_other(dashboard: dict[str, Any], metrics: list[Metric]) -> None:
    shown = {name for expression in expressions(dashboard) for name in re.findall(r"\bray_\w+", expression)}
    for metric in metrics:
        assert shown & exported(metric), metric.info["name"]
        shown -= exported(metric)
    assert shown == set()


def test_labels_are_the_tags_that_there_are(dashboard: dict[str, Any], metrics: list[Metric]) -> None:
    tags = {tag for metric in metrics for tag in metric.info["tag_keys"]} | OF_SERVE | {"le"}
    for expression in expressions(dashboard):
        matched = re.findall(r"(\w+)(?:=~|!=|!~|=)\"", expression)
        grouped = [tag for group in re.findall(r"by \(([\w, ]+)\)", expression) for tag in group.split(", ")]
        assert set(matched) | set(grouped) <= tags, expression
        # Every series is filtered by what the user has chosen, and braces and brackets are in pairs.
        assert expression.count("ray_d3llm_") == expression.count('{model=~"$model",application=~"$application"')
        assert all(expression.count(a) == expression.count(b) for a, b in ("()", "[]", "{}"))


def test_panels_are_whole(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert list(variables) == ["datasource", "application", "model"]
    places = [*panels, *(target for panel in panels for target in panel["targets"])]
    places += [variables["application"], variables["model"]]
    assert {place["datasource"]["uid"] for place in places} == {"${datasource}"}
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


def test_the_documentation_lists_every_metric(metrics: list[Metric]) -> None:
    text = (DOCS / "metrics.md").read_text()
    listed = {
        name: set(re.findall(r"`(\w+)`", tags))
        for name, tags in re.findall(r"^\| `(d3llm_\w+)` \| [\w ]+ \| ([^|]*)\|", text, re.MULTILINE)
    }
    assert listed == {metric.info["name"]: set(metric.info["tag_keys"]) - {"model"} for metric in metrics}
