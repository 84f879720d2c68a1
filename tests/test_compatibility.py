"""What users script against, frozen: a change shows up here before it breaks them.

`compatibility.yaml` beside this file is the surface of this version. What a user may have written down does not vanish
or change its meaning without an entry in CHANGELOG.md (and, for a setting, in `renamed`). After a deliberate change:

    python -m tests.test_compatibility > tests/compatibility.yaml
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pydantic import BaseModel

FROZEN = Path(__file__).with_name("compatibility.yaml")
PUBLIC = ("d3llm_ray", "d3llm_ray.decoding", "d3llm_ray.models", "d3llm_ray.tasks")


def surface() -> dict[str, Any]:
    """Everything by name, in plain data."""
    return {
        "presets": presets(),
        "verbs": verbs(),
        "renamed": renamed(),
        "python": python_names(),
        "files": file_schemas(),
        "http": http_fields(),
    }


def presets() -> dict[str, Any]:
    from d3llm_ray.decoding import PRESETS

    return {name: preset.settings() for name, preset in PRESETS.items()}


def settings_classes() -> dict[str, Any]:
    from d3llm_ray.cli import VERBS, _load
    from d3llm_ray.serving.settings import ReplicaSettings
    from d3llm_ray.tuning.space import SearchSpace

    files = {"(serve_configs: args)": ReplicaSettings, "(tune_spaces)": SearchSpace}
    return {**{name: _load(verb.settings) for name, verb in VERBS.items()}, **files}


def verbs() -> dict[str, Any]:
    """Every setting with its default, as YAML files spell it."""
    return {name: defaults(cls) for name, cls in settings_classes().items()}


def defaults(cls: Any) -> dict[str, Any]:
    return {
        name: "(required)" if field.is_required() else plain(field.get_default(call_default_factory=True))
        for name, field in cls.model_fields.items()
    }


def renamed() -> dict[str, Any]:
    return {name: dict(sorted(cls.renamed.items())) for name, cls in settings_classes().items() if cls.renamed}


def python_names() -> dict[str, Any]:
    from d3llm_ray.decoding import Completion, DiffusionLLM, Event, Output, Request, Reveal
    from d3llm_ray.evaluation.aup import aup
    from d3llm_ray.models import ZOO_NAMES, load_model

    methods = {
        name: str(inspect.signature(member))
        for name, member in inspect.getmembers(DiffusionLLM, callable)
        if not name.startswith("_")
    }
    return {
        "modules": {name: sorted(importlib.import_module(name).__all__) for name in PUBLIC},
        "DiffusionLLM": methods,
        "load_model": str(inspect.signature(load_model)),
        "aup": str(inspect.signature(aup)),
        **{cls.__name__: [field.name for field in fields(cls)] for cls in (Output, Request, Completion, Event, Reveal)},
        "zoo": list(ZOO_NAMES),
    }


def file_schemas() -> dict[str, Any]:
    from d3llm_ray.benchmark.report import BenchmarkReport
    from d3llm_ray.evaluation.report import EvaluationReport
    from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow
    from d3llm_ray.trajectories.schema import ERROR_SCHEMA, SCHEMA

    def columns(schema: pa.Schema) -> dict[str, str]:
        return {field.name: f"{field.type}{'' if field.nullable else ' not null'}" for field in schema}

    benchmark = BenchmarkReport("", {}, (), (), (("way", str),), {})
    return {
        "trajectories": columns(SCHEMA),
        "errors": columns(ERROR_SCHEMA),
        "evaluation row": [field.name for field in fields(EvaluationRow) if field.name != "samples"],
        "evaluation sample": [field.name for field in fields(EvaluatedSample)],
        "evaluation report": list(EvaluationReport((), {}).to_dict()),
        "benchmark report": list(benchmark.to_dict()),
    }


def http_fields() -> dict[str, Any]:
    from d3llm_ray.serving import replies, schemas

    bodies = {
        name: defaults(cls)
        for module in (schemas, replies)
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, BaseModel) and cls.__module__ == module.__name__ and not name.startswith("_")
    }
    return {"routes": routes(), "bodies": bodies}


def routes() -> list[str]:
    from unittest.mock import MagicMock

    from d3llm_ray.serving.http import create_app
    from d3llm_ray.serving.settings import ReplicaSettings

    service = MagicMock()
    service.settings = ReplicaSettings()
    documented = create_app(service).openapi()["paths"]
    return sorted(f"{method.upper()} {path}" for path, methods in documented.items() for method in methods)


def plain(value: Any) -> Any:
    """A default as YAML can hold it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def written(content: Any) -> str:
    return yaml.safe_dump(plain(content), sort_keys=False, width=120, allow_unicode=True)


@pytest.mark.parametrize("part", ["presets", "verbs", "renamed", "python", "files", "http"])
def test_what_users_script_against_has_not_changed(part: str) -> None:
    frozen = yaml.safe_load(FROZEN.read_text(encoding="utf-8"))
    assert yaml.safe_load(written(surface()[part])) == frozen[part]


if __name__ == "__main__":
    print(written(surface()), end="")
