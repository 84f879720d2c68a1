"""Every student is resolved, named and checked before the first is trained."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d3llm_ray.ablation.plan import TINY_RECIPE, check_trials, make_design, plan_trials
from d3llm_ray.config import read_yaml
from d3llm_ray.distillation.preparation import load
from d3llm_ray.distillation.student import student_family
from d3llm_ray.errors import InputError
from d3llm_ray.trajectories.schema import SCHEMA


def _keys(settings, rows: Path) -> list[str]:
    return [trial.key for trial in plan_trials(make_design(settings), str(rows), None)]


def test_the_teacher_then_every_row_of_every_seed(make_settings, rows):
    settings = make_settings(variants=["window", "rows"])
    trials = plan_trials(make_design(settings), str(rows), None)
    assert [(trial.variant, trial.seed) for trial in trials] == [
        ("teacher", 0),
        *((name, seed) for seed in (0, 1) for name in ("recipe", "window-fixed", "rows-all")),
    ]
    teacher, recipe, window, everything, *_ = trials
    assert teacher.distill is None and teacher.model == settings.teacher
    assert [chosen.name for chosen in teacher.decoders] == ["vanilla", "d3llm-nocache", "d3llm-nocache"]
    for student in trials[1:]:
        assert [chosen.settings()["entropy_threshold"] for chosen in student.decoders] == [0.15, 0.45]
        assert student.distill.output == student.model and Path(student.model).is_absolute()
        assert (student.distill.max_rows, student.distill.workers) == (36, 1)  # 4 of 40 answers are wrong
    assert recipe.distill.objective.window_sizes[0] == 8 and window.distill.objective.window_sizes == (16,)
    assert (recipe.distill.keep, everything.distill.keep) == ("correct", "all")
    assert recipe.distill.seed == 0 and trials[4].distill.seed == 1
    assert check_trials(trials) == 2  # 36 rows make two batches of 16
    ids = [set(load(row.distill, *student_family(row.distill))[0].prompt_ids) for row in (recipe, everything)]
    assert len(ids[0]) == len(ids[1]) == 36 and ids[0] != ids[1]


def test_reference_answers_replace_the_rows(make_settings, rows, tmp_path):
    table = [row | {"reveal_step": None, "forwards": None} for row in pq.read_table(rows).to_pylist()]
    answers = tmp_path / "answers.parquet"
    pq.write_table(pa.Table.from_pylist(table[:30], schema=SCHEMA), answers)
    trials = plan_trials(make_design(make_settings(variants=["targets"])), str(rows), str(answers))
    sources = {trial.variant: trial.distill.trajectories for trial in trials if trial.distill}
    assert sources == {"recipe": str(rows), "order-random": str(rows), "targets-reference": str(answers)}
    assert {trial.distill.max_rows for trial in trials if trial.distill} == {27}  # as many as the smaller folder has
    assert check_trials(trials) == 1


def test_keys_follow_what_a_figure_depends_on(make_settings, rows):
    before = _keys(make_settings(variants=["noise-fixed"]), rows)
    assert len(set(before)) == 5 and before[1].startswith("recipe-seed0-")
    how = {"concurrent_trials": 1, "keep_students": True, "seeds": 3, "variants": ["noise"]}
    assert set(before) < set(_keys(make_settings(**how), rows))  # grown, nothing to repeat
    assert not set(before) & set(_keys(make_settings(variants=["noise-fixed"], count=4), rows))
    other = make_settings(variants=["noise-fixed"], distill={"epochs": 1, "batch_size": 16, "micro_batch_size": 8})
    assert set(before) & set(_keys(other, rows)) == {before[0]}  # the teacher is the same


def test_rows_that_train_longer_are_refused(make_settings, rows, tmp_path):
    path = tmp_path / "rows.yaml"
    path.write_text("variants:\n  held-out: {claim: c, changes: {val_every: 1, val_rows: 8}}\n")
    trials = plan_trials(make_design(make_settings(variants_file=path)), str(rows), None)
    with pytest.raises(InputError, match=r"variants: got .*2: 'recipe', 1: 'held-out'"):
        check_trials(trials)


def test_rows_without_an_order_are_refused_before_training(make_settings, rows, tmp_path):
    table = [row | {"reveal_step": None, "forwards": None} for row in pq.read_table(rows).to_pylist()]
    answers = tmp_path / "answers.parquet"
    pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), answers)
    with pytest.raises(InputError, match="reveal_step"):
        check_trials(plan_trials(make_design(make_settings(variants=["noise"])), str(answers), None))


def test_the_embedded_recipe_is_the_default(make_settings):
    design = make_design(make_settings(teacher=None, distill={}))
    assert design.recipe.items() >= read_yaml(TINY_RECIPE).items() and design.teacher == "tiny-llada"
    assert len(design.variants) == 12


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": "gpt-9"}, "gpt-9.*tiny-llada"),
        ({"task": "chess"}, "task.*chess.*arith"),
        ({"variants": ["orders"]}, "variants.*orders.*order-random"),
        ({"distill": {"lrr": 1}}, "lrr: unknown setting"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml"),
        ({"variants_file": "nowhere.yaml"}, "nowhere.yaml"),
        ({"decoder": "fast-dllm-dual"}, "decoder.*entropy_threshold"),
        ({"decoder": "d9"}, "d9.*d3llm-nocache"),
        ({"thresholds": [-1.0, 0.45]}, "entropy_threshold: got -1.0"),
        ({"thresholds": [0.15, 0.3]}, "reference_threshold: got 0.45.*0.15, 0.3"),
        ({"thresholds": [0.45, 0.45]}, "thresholds.*each once"),
        ({"seeds": 1}, "seeds"),
        ({"problems": 9, "cpus_per_trial": 2}, "problems: is called count now; cpus_per_trial: .*cpus_per_actor"),
        ({"device": "cuda"}, "gpus_per_actor: got 0 with device: cuda"),
        ({"decoder_settings": {"block_sice": 8}}, "block_sice"),
        ({"teacher": "tiny-ar"}, "decoder.*tiny-ar|causal"),
    ],
)
def test_what_cannot_work_is_refused_at_once(make_settings, values, message):
    with pytest.raises(InputError, match=message):
        make_design(make_settings(**values))
