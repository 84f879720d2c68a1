"""The rows of an ablation: what each changes in the recipe, and what the paper says it costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from d3llm_ray.config import Settings, SettingsGroup, build, merge
from d3llm_ray.distillation.objectives import PseudoTrajectory
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.errors import InputError, require, unknown
from d3llm_ray.yaml_file import read_yaml

RECIPE = "recipe"  # the name of the row that changes nothing
TEACHER = "teacher"  # that of the model before distillation

# What all students have in common; a row that differed in it would measure the budget, not the recipe.
SHARED = (
    *("teacher", "trajectories", "output", "seed", "epochs", "max_steps", "max_rows", "batch_size"),
    *("workers", "device", "cpus_per_actor"),
)


class Variant(SettingsGroup):
    """A recipe with something taken out or replaced."""

    claim: str = Field(description="which part of the recipe it is about; rows are grouped by it")
    changes: dict[str, Any] = Field(
        default={}, description="settings of `d3llm-ray distill` that differ, within `objective` as well"
    )
    reference_answers: bool = Field(default=False, description="train on reference answers instead of the teacher's")
    against: str = Field(default=RECIPE, description="the row that it is compared with")
    published_gain: float | None = Field(default=None, description="percent of TPF that the part gains, if published")


class Variants(Settings):
    """A file of rows, by name."""

    variants: dict[str, Variant] = Field(min_length=1, description="name -> what the row changes")


def built_in(recipe: DistillSettings) -> dict[str, Variant]:
    """The rows for the claims of arXiv:2601.07568; its README attributes gains in TPF to three of them.

    Raises `InputError` for a recipe with another objective than the paper's.
    """
    objective = recipe.objective
    if not isinstance(objective, PseudoTrajectory):
        accepted = f"{PseudoTrajectory.name}, or a variants_file for other recipes"
        raise InputError(f"recipe: got objective {objective.name}; accepted: {accepted}")

    def row(claim: str, published_gain: float | None = None, **changes: Any) -> Variant:
        return Variant(claim=claim, changes={"objective": changes}, published_gain=published_gain)

    return {
        "order-random": row("order", 18.0, order="random"),
        "order-shuffled": row("order", order="shuffled"),
        "order-reversed": row("order", order="reversed"),
        "order-inverted": row("order", order="inverted", inverted_pairs=0.2),
        "noise-fixed": row("noise", 12.0, noise_start=0.5, noise_end=0.5, noise_max=0.5),
        "noise-reversed": row("noise", noise_start=objective.noise_end, noise_end=objective.noise_start),
        "window-fixed": row("window", 8.0, window_sizes=objective.window_sizes[-1:]),
        "windows-canvas": row("window domain", window_domain="canvas"),
        "certainty-off": row("certainty", certainty_weight=0.0),
        "complement-off": row("complement", complement_weight=0.0),
        "rows-all": Variant(claim="rows", changes={"keep": "all", "target": "trajectory"}),
        "targets-reference": Variant(
            claim="targets",
            changes={"objective": {"order": "random"}},
            reference_answers=True,
            against="order-random",
        ),
    }


def read_variants(path: Path) -> dict[str, Variant]:
    """Rows from a YAML file, `variants: {name: {claim: ..., changes: {...}}}`; every `InputError` names the file."""
    try:
        return build(Variants, read_yaml(path, "variants_file")).variants
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def check(variants: Mapping[str, Variant], recipe: Mapping[str, Any]) -> None:
    """Raise `InputError` for a row that is not a recipe, changes nothing, or is compared with none.

    `recipe`: the values of `DistillSettings` that a row's changes replace.
    """
    unchanged = build(DistillSettings, dict(recipe))
    for name, variant in variants.items():
        field = f"variants.{name}"
        reserved = name in (RECIPE, TEACHER) or not name.replace("-", "").replace("_", "").isalnum()
        require(not reserved, field, name, f"letters, digits, - and _; not {RECIPE} or {TEACHER}")
        if variant.against not in (RECIPE, *variants.keys() - {name}):
            raise unknown(f"{field}.against", variant.against, (RECIPE, *variants.keys() - {name}))
        for setting in variant.changes:
            require(setting not in SHARED, f"{field}.changes", setting, "settings that not all students share")
        try:
            changed = build(DistillSettings, merge(dict(recipe), variant.changes))
        except InputError as error:
            raise InputError(f"{field}.changes: {error}") from error
        different = changed != unchanged or variant.reference_answers
        require(different, f"{field}.changes", variant.changes, "something that the recipe does not do already")


def choose(variants: Mapping[str, Variant], names: Iterable[str]) -> dict[str, Variant]:
    """The rows of these names or claims, and those that they are compared with; all of them for no names.

    Raises `InputError` for a name that is neither.
    """
    wanted = list(names) or list(variants)
    claims = {variant.claim for variant in variants.values()}
    chosen: set[str] = set()
    for name in wanted:
        if name not in variants and name not in claims:
            raise unknown("variants", name, [*variants, *claims])
        chosen |= {row for row, variant in variants.items() if name in (row, variant.claim)}
    while added := {variants[name].against for name in chosen} - chosen - {RECIPE}:
        chosen |= added
    return {name: variant for name, variant in variants.items() if name in chosen}
