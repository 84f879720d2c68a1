"""Settings of the verbs whose benchmarks a bare machine runs too: the fields of their plan, and where the files go."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from pydantic import Field, create_model, model_validator

from d3llm_ray.benchmark.host_plan import HostPlan
from d3llm_ray.benchmark.plan import BenchmarkPlan
from d3llm_ray.benchmark.refresh_plan import RefreshPlan
from d3llm_ray.benchmark.step_plan import StepPlan
from d3llm_ray.config import Settings


class PlanSettings(Settings):
    """Settings that are a plan of `plan_class`, and an output folder."""

    plan_class: ClassVar[Any]

    @model_validator(mode="after")
    def _check(self) -> PlanSettings:
        self.plan()
        return self

    def plan(self) -> Any:
        """What to measure."""
        return self.plan_class(**{field.name: getattr(self, field.name) for field in fields(self.plan_class)})


def _fields_of(plan_class: Any) -> Any:
    """A base class with the plan's fields: one place for their types, defaults and descriptions."""
    hints: dict[str, Any] = get_type_hints(plan_class)
    columns: dict[str, Any] = {}
    for option in fields(plan_class):
        factory = option.default_factory
        default: dict[str, Any] = (
            {"default_factory": factory} if factory is not MISSING else {"default": option.default}
        )
        columns[option.name] = (hints[option.name], Field(**default, **option.metadata))
    return create_model(f"{plan_class.__name__}Fields", __base__=PlanSettings, **columns)


_DECODING: Any = _fields_of(BenchmarkPlan)
_STEP: Any = _fields_of(StepPlan)
_HOST: Any = _fields_of(HostPlan)
_REFRESH: Any = _fields_of(RefreshPlan)


class BenchmarkSettings(_DECODING):  # type: ignore[misc]
    """Measure decoding speed against what the machine allows, on a model, a checkpoint or a shape."""

    verb: ClassVar[str] = "benchmark"
    renamed: ClassVar[dict[str, str]] = {"requests": "count", "repeats": "rounds"}
    plan_class: ClassVar[Any] = BenchmarkPlan

    output: Path = Field(Path("runs/benchmark"), description="folder of the report")


class StepBenchmarkSettings(_STEP):  # type: ignore[misc]
    """Measure one optimizer step of a distillation: tokens a second, share of the device's peak, memory."""

    verb: ClassVar[str] = "benchmark step"
    plan_class: ClassVar[Any] = StepPlan

    output: Path = Field(Path("runs/benchmark-step"), description="folder of the report")


class HostBenchmarkSettings(_HOST):  # type: ignore[misc]
    """Measure the host's share of a decoding step: all but the model, on the processor alone."""

    verb: ClassVar[str] = "benchmark host"
    plan_class: ClassVar[Any] = HostPlan

    output: Path = Field(Path("runs/benchmark-host"), description="folder of the report")


class RefreshBenchmarkSettings(_REFRESH):  # type: ignore[misc]
    """Measure what refreshing a cache costs by length and block size, and where it breaks even."""

    verb: ClassVar[str] = "benchmark refresh"
    plan_class: ClassVar[Any] = RefreshPlan

    output: Path = Field(Path("runs/benchmark-refresh"), description="folder of the report")
