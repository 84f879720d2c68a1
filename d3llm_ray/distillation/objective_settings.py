"""Objectives as settings: which one, and its own parameters, derived from what their classes state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from d3llm_ray.distillation.objectives import OBJECTIVES, Objective, PseudoTrajectory
from d3llm_ray.errors import InputError, require, unknown

DEFAULT = PseudoTrajectory()


def _parameters(objective: type[Objective]) -> type[BaseModel]:
    """A model of `name` and the objective's parameters, with their defaults, limits and descriptions."""
    hints = get_type_hints(objective)
    which = "; ".join(f"{known.name}: {known.summary}" for known in OBJECTIVES.values())
    fields: dict[str, Any] = {"name": (Literal[objective.name], Field(objective.name, description=which))}
    for field in dataclasses.fields(objective):  # type: ignore[arg-type]  # every objective is a dataclass
        fields[field.name] = hints[field.name], Field(field.default, **field.metadata)
    return create_model(objective.__name__, __config__=ConfigDict(extra="forbid", frozen=True), **fields)


PARAMETERS = {name: _parameters(objective) for name, objective in OBJECTIVES.items()}

if TYPE_CHECKING:
    ObjectiveSettings: TypeAlias = Objective
else:
    # What the command line offers; it shows the defaults of the last one, hence the default objective there.
    _models = tuple(sorted(PARAMETERS.values(), key=lambda model: model is PARAMETERS[DEFAULT.name]))
    ObjectiveSettings = Annotated[reduce(or_, _models), Field(discriminator="name")]


def read_objective(value: Any) -> Objective:
    """The objective of a name, which leaves its parameters at their defaults, or of `{name: ..., PARAMETER: ...}`.

    Raises `ValueError` (pydantic's, or ours with the parameter's full name) for what is not accepted.
    """
    if any(isinstance(value, objective) for objective in OBJECTIVES.values()):
        known: Objective = value
        return known
    values = {"name": value} if isinstance(value, str) else value
    require(isinstance(values, Mapping), "objective", value, f"{', '.join(OBJECTIVES)}, or a mapping with that name")
    name = values.get("name", DEFAULT.name)
    if name not in PARAMETERS:
        raise unknown("objective.name", name, PARAMETERS)
    model = PARAMETERS[name]
    for key in values:
        if key not in model.model_fields:
            raise InputError(
                f"objective.{key}: unknown setting of {name}; accepted: {', '.join(sorted(model.model_fields))}"
            )
    given = model.model_validate(dict(values)).model_dump(exclude={"name"})
    try:
        return OBJECTIVES[name](**given)
    except InputError as error:
        raise InputError(f"objective.{error}") from error


def objective_values(objective: Objective) -> dict[str, Any]:
    """The reverse of `read_objective`, for a settings file."""
    return PARAMETERS[objective.name](**dataclasses.asdict(objective)).model_dump(mode="json")  # type: ignore[call-overload]
