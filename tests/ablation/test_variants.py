"""Rows differ from the recipe in what they name and in nothing else; mistakes in them are named."""

from __future__ import annotations

import pytest

from d3llm_ray.ablation.plan import TINY_RECIPE
from d3llm_ray.ablation.variants import Variant, built_in, check, choose, read_variants
from d3llm_ray.config import build, read_yaml
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.errors import InputError

RECIPE = {**read_yaml(TINY_RECIPE), "trajectories": "rows", "output": "student"}

# Written down from the issue's list, against the embedded recipe: window 8 to 16, noise 0 to .8, correct rows.
EXPECTED = {
    "order-random": {"order": "random"},
    "order-shuffled": {"order": "shuffled"},
    "order-reversed": {"order": "reversed"},
    "order-inverted": {"order": "inverted", "inverted_pairs": 0.2},
    "noise-fixed": {"noise_start": 0.5, "noise_end": 0.5, "noise_max": 0.5},
    "noise-reversed": {"noise_start": 0.8, "noise_end": 0.0},
    "window-fixed": {"window_sizes": (16,)},
    "certainty-off": {"entropy_weight": 0.0},
    "complement-off": {"complement_weight": 0.0},
    "rows-all": {"keep": "all"},
    "targets-reference": {"order": "random"},
}


@pytest.fixture
def variants() -> dict[str, Variant]:
    return built_in(build(DistillSettings, RECIPE))


def test_the_recipe_is_the_papers():
    recipe = build(DistillSettings, RECIPE)
    assert (recipe.order, recipe.keep) == ("trajectory", "correct")
    assert (recipe.noise_start, recipe.noise_end, recipe.noise_max) == (0.0, 0.8, 0.8)
    assert recipe.complement_weight > 0 and recipe.entropy_weight > 0
    assert recipe.window_sizes[0] * 2 == recipe.window_sizes[-1] == 16  # the embedded model's block


def test_every_row_changes_exactly_what_it_names(variants):
    assert variants.keys() == EXPECTED.keys()
    recipe = build(DistillSettings, RECIPE).model_dump()
    for name, variant in variants.items():
        changed = build(DistillSettings, RECIPE | variant.changes).model_dump()
        assert changed == recipe | EXPECTED[name], name
        assert changed != recipe, name
        assert variant.reference_answers == (name == "targets-reference")
    check(variants, RECIPE)


def test_published_figures_and_comparisons(variants):
    published = {name: one.published_gain for name, one in variants.items() if one.published_gain is not None}
    assert published == {"order-random": 18.0, "noise-fixed": 12.0, "window-fixed": 8.0}
    assert {name: one.against for name, one in variants.items() if one.against != "recipe"} == {
        "targets-reference": "order-random"
    }


def test_another_recipes_rows_follow_it():
    eight_billion = build(DistillSettings, RECIPE | {"window_sizes": [16, 24, 32], "noise_end": 0.6})
    rows = built_in(eight_billion)
    assert rows["window-fixed"].changes == {"window_sizes": (32,)}
    assert rows["noise-reversed"].changes == {"noise_start": 0.6, "noise_end": 0.0}


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
        ({"changes": {"order": "sideways"}}, "variants.mine.changes: order.*sideways"),
        ({"changes": {"noise_start": 0.9}}, "variants.mine.changes: noise_max"),
        ({"changes": {"order": "trajectory"}}, "mine.changes.*does not do already"),
        ({}, "mine.changes.*does not do already"),
        ({"changes": {"epochs": 3}}, "mine.changes: got 'epochs'.*all students share"),
        ({"changes": {"seed": 3}}, "mine.changes: got 'seed'"),
        ({"changes": {"order": "random"}, "against": "yours"}, "mine.against.*yours.*recipe"),
        ({"changes": {"order": "random"}, "against": "mine"}, "mine.against.*mine"),
    ],
)
def test_a_row_that_cannot_be_compared_is_refused(row, message):
    with pytest.raises(InputError, match=message):
        check({"mine": Variant(claim="order", **row)}, RECIPE)


@pytest.mark.parametrize("name", ["recipe", "teacher", "my row", "a/b"])
def test_names_must_be_free_and_fit_a_file(name):
    with pytest.raises(InputError, match="variants"):
        check({name: Variant(claim="order", changes={"order": "random"})}, RECIPE)


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
