"""Points of methods on tasks, as a YAML file holds them: what AUP is computed from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, field_validator

from d3llm_ray.config import Settings, SettingsGroup, build, read_yaml, recipe_file
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.aup import Point, counted_points

PUBLISHED = Path(__file__).with_name("published")


def _points(points: tuple[Point, ...]) -> tuple[Point, ...]:
    counted_points(points)
    return points


def _speeds(points: tuple[Point, ...]) -> tuple[Point, ...]:
    for speed, accuracy in points:
        if not (0 < speed < float("inf") and 0 <= accuracy <= 100):
            raise ValueError(
                f"got {(speed, accuracy)}; accepted: tokens a second above 0, accuracy of 0 to 100 percent"
            )
    return points


class MethodPoints(SettingsGroup):
    """One method's measurements, by task."""

    points: dict[str, Annotated[tuple[Point, ...], AfterValidator(_points)]] = Field(
        min_length=1, description="by task: pairs of tokens per forward and accuracy in percent"
    )
    tps: dict[str, Annotated[tuple[Point, ...], AfterValidator(_speeds)]] = Field(
        default={}, description="by task: pairs of tokens a second and accuracy in percent"
    )
    shown: bool = Field(default=True, description="false: counts for the best accuracy and in tables, is not drawn")
    note: str = Field(default="", description="a remark for the table")


class PointsTable(Settings):
    """Methods that are scored together: a task's best accuracy is that of any of them."""

    title: str = Field("", description="heading of the table; default: the file's name")
    source: str = Field("", description="where the figures come from")
    divisor: float | None = Field(
        None, gt=0, description="sums over tasks are divided by this; null: by the number of a method's own tasks"
    )
    best: dict[str, Annotated[float, Field(gt=0, le=100)]] = Field(
        {}, description="by task: the best accuracy in percent, where a method that is not listed has reached it"
    )
    methods: dict[str, MethodPoints] = Field(min_length=1, description="by name: the points of a method")

    recipes: ClassVar[Path | None] = PUBLISHED

    @field_validator("methods")
    @classmethod
    def _percent(cls, methods: dict[str, MethodPoints]) -> dict[str, MethodPoints]:
        for task in tasks_of(methods):
            shares = [accuracy for method in methods.values() for _, accuracy in method.points.get(task, ())]
            if 0 < max(shares) <= 1:
                raise ValueError(
                    f"accuracies of {task!r} are 1 at most; accepted: percent, 0 to 100, such as {100 * max(shares):g}"
                )
        return methods

    @property
    def tasks(self) -> list[str]:
        """Every task, in the order of the methods that name it."""
        return tasks_of(self.methods)


def tasks_of(methods: dict[str, MethodPoints]) -> list[str]:
    return list(dict.fromkeys(task for method in methods.values() for task in method.points))


def open_points(name_or_file: str) -> PointsTable:
    """A points file, or a published table by its name: `llada`, `dream`, `dream-coder` (arXiv:2601.07568).

    Raises `InputError` that names the file and the field: an unknown name or key, a key that comes twice, a method
    without points, tokens per forward that are not above 0, accuracies outside 0 to 100 or given as shares.
    """
    path = recipe_file(name_or_file, PointsTable, "points")
    values = read_yaml(path, "points")
    try:
        return build(PointsTable, {"title": path.stem, **values})
    except InputError as error:
        raise InputError(f"points: {name_or_file!r}: {error}") from error
