"""Rows differ from the recipe in what they name and in nothing else; mistakes in them are named."""

from __future__ import annotations

import pytest

from d3llm_ray.ablation.plan import TINY_RECIPE
from d3llm_ray.ablation.variants import Variant, built_in, check, choose, read_variants
from d3llm_ray.config import build, merge, read_yaml
from d3llm_ray.distillation.objectives import PseudoTrajectory
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.errors import InputError

RECIPE = {**read_yaml(TINY_RECIPE), "trajectories": "rows", "output": "student"}

# Written down from the issue's list, against the embedded recipe: window 8 to 16, noise 0 to .8, correct rows.
EXPECTED = {
    "order-random": {"objective": {"order": "random"}},
    "order-shuffled": {"objective": {"order": "shuffled"}},
    "order-reversed": {"objective": {"order": "reversed"}},
    "order-inverted": {"objective": {"order": "inverted", "inverted_pairs": 0.2}},
    "noise-fixed": {"objective": {"noise_start": 0.5, "noise_end": 0.5, "noise_max": 0.5}},
    "noise-reversed": {"objective": {"noise_start": 0.8, "noise_end": 0.0}},
    "window-fixed": {"objective": {"window_sizes": [16]}},
    "windows-canvas": {"objective": {"window_domain": "canvas"}},
    "certainty-off": {"objective": {"certainty_weight": 0.0}},
    "complement-off": {"objective": {"complement_weight": 0.0}},
    "rows-all": {"keep": "all", "target": "trajectory"},
    "targets-reference": {"objective": {"order": "random"}},
}


@pytest.fixture
def variants() -> dict[str, Variant]:
    return built_in(build(DistillSettings, RECIPE))


def test_the_recipe_is_the_papers():
    recipe = build(DistillSettings, RECIPE)
    objective = recipe.objective
    assert isinstance(objective, PseudoTrajectory)
    assert (objective.order, objective.window_domain, recipe.keep) == ("trajectory", "answer", "correct")
    assert (objective.noise_start, objective.noise_end, objective.noise_max) == (0.0, 0.8, 0.8)
    assert objective.complement_weight > 0 and objective.certainty_weight > 0
    assert objective.window_sizes[0] * 2 == objective.window_sizes[-1] == 16  # the embedded model's block


def test_every_row_changes_exactly_what_it_names(variants):
    assert variants.keys() == EXPECTED.keys()
    recipe = build(DistillSettings, RECIPE).model_dump()
    for name, variant in variants.items():
        changed = build(DistillSettings, merge(RECIPE, variant.changes)).model_dump()
        expected = dict(EXPECTED[name])
        objective = recipe["objective"] | expected.pop("objective", {})
        assert changed == recipe | expected | {"objective": objective}, name
        assert changed != recipe, name
        assert variant.reference_answers == (name == "targets-reference")
    check(variants, RECIPE)


def test_published_figures_and_comparisons(variants):
    published = {name: row.published_gain for name, row in variants.items() if row.published_gain is not None}
    assert published == {"order-random": 18.0, "noise-fixed": 12.0, "window-fixed": 8.0}
    assert {name: row.against for name, row in variants.items() if row.against != "recipe"} == {
        "targets-reference": "order-random"
    }


def test_another_recipes_rows_follow_it():
    eight_billion = merge(RECIPE, {"objective": {"window_sizes": [16, 24, 32], "noise_end": 0.6}})
    rows = built_in(build(DistillSettings, eight_billion))
    assert rows["window-fixed"].changes == {"objective": {"window_sizes": (32,)}}
    assert rows["noise-reversed"].changes == {"objective": {"noise_start": 0.6, "noise_end": 0.0}}


def test_the_papers_rows_need_the_papers_objective():
    with pytest.raises(InputError, match="recipe: got objective d2f; accepted: windows, or a variants_file"):
        built_in(build(DistillSettings, RECIPE | {"objective": "d2f"}))


def test_rows_are_chosen_by_name_or_claim_with_what_they_are_compared_with(variants):
    assert list(choose(variants, [])) == list(EXPECTED)
    assert list(choose(variants, ["noise"])) == ["noise-fixed", "noise-reversed"]
    assert list(choose(variants, ["targets", "rows-all"])) == ["order-random", "rows-all", "targets-reference"]
    with pytest.raises(InputError, match=r"variants: unknown value 'nois'.*noise-fixed"):
        choose(variants, ["noise", "nois"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"changes": {"ordr": "random"}}, "variants.mine.changes: ordr: unknown setting"),
        ({"changes": {"objective": {"order": "sideways"}}}, "variants.mine.changes: objective.order.*sideways"),
        ({"changes": {"order": "random"}}, "variants.mine.changes: order: is called objective.order now"),
        ({"changes": {"objective": {"noise_start": 0.9}}}, "variants.mine.changes: objective.noise_max"),
        ({"changes": {"objective": {"order": "trajectory"}}}, "mine.changes.*does not do already"),
        ({}, "mine.changes.*does not do already"),
        ({"changes": {"epochs": 3}}, "mine.changes: got 'epochs'.*all students share"),
        ({"changes": {"seed": 3}}, "mine.changes: got 'seed'"),
        ({"changes": {"objective": {"order": "random"}}, "against": "yours"}, "mine.against.*yours.*recipe"),
        ({"changes": {"objective": {"order": "random"}}, "against": "mine"}, "mine.against.*mine"),
    ],
)
def test_a_row_that_cannot_be_compared_is_refused(row, message):
    with pytest.raises(InputError, match=message):
        check({"mine": Variant(claim="order", **row)}, RECIPE)


@pytest.mark.parametrize("name", ["recipe", "teacher", "my row", "a/b"])
def test_names_must_be_free_and_fit_a_file(name):
    with pytest.raises(InputError, match="variants"):
        check({name: Variant(claim="order", changes={"objective": {"order": "random"}})}, RECIPE)


def test_rows_from_a_file(tmp_path):
    path = tmp_path / "rows.yaml"
    path.write_text("variants:\n  low-rank: {claim: adapters, changes: {lora_rank: 8}, published_gain: 3}\n")
    assert read_variants(path) == {"low-rank": Variant(claim="adapters", changes={"lora_rank": 8}, published_gain=3.0)}
    path.write_text("variants:\n  low-rank: {changes: {lora_rank: 8}}\n")
    with pytest.raises(InputError, match=r"rows.yaml: variants.low-rank.claim: required"):
        read_variants(path)
    path.write_text("rows: {}\n")
    with pytest.raises(InputError, match=r"rows.yaml: .*variants"):
        read_variants(path)
