"""A search space in Ray Tune's words."""

from __future__ import annotations

from typing import Any

from ray import tune

from d3llm_ray.tuning.space import Range, SearchSpace, ValueChoice


def domains(space: SearchSpace) -> dict[str, Any]:
    """Parameter -> where Tune searches it."""
    return {name: _domain(parameter) for name, parameter in space.parameters.items()}


def _domain(parameter: Range | ValueChoice) -> Any:
    if isinstance(parameter, ValueChoice):
        return tune.choice(list(parameter.values))
    if parameter.type == "int":
        return tune.randint(int(parameter.low), int(parameter.high) + 1)
    return (tune.loguniform if parameter.type == "log_float" else tune.uniform)(parameter.low, parameter.high)
