"""Every setting of `ablate` has a value of its own here, and is looked for where it acts; what arms differ in.

A new setting needs a line in `ARRIVES`. The verb runs in this process: Ray Tune is a stand-in that carries the trials
out, and what a trial calls is watched instead.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from d3llm_ray.ablation import run as verb
from d3llm_ray.ablation import trial as trials
from d3llm_ray.ablation.plan import make_design, plan_trials
from d3llm_ray.ablation.settings import AblateSettings
from d3llm_ray.config import build
from d3llm_ray.decoding import decoding_settings
from d3llm_ray.distillation.plan import TrainingPlan
from d3llm_ray.distillation.preparation import load
from d3llm_ray.distillation.student import student_family
from d3llm_ray.evaluation.rows import EvaluatedSample, summarise
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import load_task
from d3llm_ray.trajectories.schema import SCHEMA
from tests.wiring import Look, Seen, only

QUIET = Progress(quiet=True)
CANVAS = 64


def distilled(field: str) -> Look:
    """A setting of every student's distillation."""

    def look(seen: Seen) -> Any:
        (value,) = {getattr(settings, field) for settings in seen["distilled"]}
        return value

    return look


# Setting -> (a value that is not its default, where it is seen); None: a path that the fixture makes.
ARRIVES: dict[str, tuple[Any, Look]] = {
    "recipe": (None, lambda seen: "mine" if distilled("weight_decay")(seen) == 0.03 else "the embedded model's"),
    "distill": (None, lambda seen: {"lora_alpha": distilled("lora_alpha")(seen)}),
    "teacher": (None, distilled("teacher")),
    "trajectories": (None, lambda seen: seen["trained on", "low-rank"][0]),
    "reference_trajectories": (None, lambda seen: seen["trained on", "given-answers"][0]),
    "rows": (30, only("prompts")),
    "variants": (["adapters", "targets"], lambda seen: _claims(seen["variants"])),
    "variants_file": (None, lambda seen: "mine" if "given-answers" in seen["variants"] else "the built-in ones"),
    "seeds": (4, lambda seen: len({settings.seed for settings in seen["distilled"]})),
    "task": (None, only("task")),
    "split": ("validation", only("split")),
    "count": (3, only("count")),
    "decoder": ("dparallel", lambda seen: seen["decoders"][1].name),
    "decoder_settings": ({"block_size": 8}, lambda seen: {"block_size": seen["decoders"][1].settings()["block_size"]}),
    "thresholds": (
        (0.2, 0.3),
        lambda seen: tuple(sorted({_threshold(chosen) for chosen in seen["decoders"]} - {None})),
    ),
    "reference_threshold": (0.3, only("compared at")),
    "max_tokens": (16, only("max_tokens")),
    "max_batch_size": (5, only("max_batch_size")),
    "dtype": ("bfloat16", only("dtype")),
    "device": ("cuda", only("device")),
    "cpus_per_actor": (3, lambda seen: only("resources")(seen)["cpu"]),
    "gpus_per_actor": (0.5, lambda seen: only("resources")(seen)["gpu"]),
    "concurrent_trials": (6, only("at a time")),
    "resource_timeout_s": (3.5, only("patience")),
    "keep_students": (True, lambda seen: not seen["removed"]),
    "output": (None, only("output")),
}
ROWS = {
    "low-rank": {"claim": "adapters", "changes": {"lora_rank": 2}},
    "given-answers": {"claim": "targets", "changes": {"objective": {"order": "random"}}, "reference_answers": True},
    "plain": {"claim": "certainty", "changes": {"objective": {"certainty_weight": 0.0}}},
}


def _claims(variants: list[str]) -> list[str]:
    return sorted(str(ROWS[name]["claim"]) for name in {*variants} if name in ROWS)


def _threshold(decoder: Any) -> float | None:
    value: float | None = decoder.settings().get("entropy_threshold")
    return value


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, rows: Path) -> dict[str, Any]:
    """A value of its own for every setting."""
    folder = tmp_path_factory.mktemp("wiring")
    small = {"epochs": 1, "batch_size": 16, "micro_batch_size": 8, "lora_rank": 4, "precision": "float32"}
    recipe = {**small, "teacher": "tiny-llada", "keep": "correct", "weight_decay": 0.03, "lora_alpha": 4}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "variants.yaml").write_text(yaml.safe_dump({"variants": ROWS}, sort_keys=False))
    (folder / "task.jsonl").write_text('{"prompt": "one", "reference": "1"}\n' * 9)
    answers = [row | {"reveal_step": None, "forwards": None} for row in pq.read_table(rows).to_pylist()]
    pq.write_table(pa.Table.from_pylist(answers, schema=SCHEMA), folder / "answers.parquet")
    paths = {
        "recipe": folder / "recipe.yaml",
        "distill": {"lora_alpha": 7},
        "teacher": str(tiny_checkpoint),
        "trajectories": str(rows),
        "reference_trajectories": str(folder / "answers.parquet"),
        "variants_file": folder / "variants.yaml",
        "task": str(folder / "task.jsonl"),
        "output": folder / "out",
    }
    return {name: ARRIVES[name][0] for name in AblateSettings.model_fields if name in ARRIVES} | paths


def _watch(patch: pytest.MonkeyPatch, seen: Seen) -> None:
    """Stand-ins for Ray Tune, and for what a trial calls."""

    class Tuner:
        def __init__(self, trainable: Any, *, param_space: Any, tune_config: Any, run_config: Any) -> None:
            self.trainable, self.numbers = trainable, param_space["number"]
            seen["at a time"].append(tune_config.max_concurrent_trials)

        def fit(self) -> list[Any]:
            for number in self.numbers:
                self.trainable({"number": number})
            return [SimpleNamespace(error=None, config={"number": number}) for number in self.numbers]

    def with_resources(trainable: Any, resources: dict[str, float]) -> Any:
        seen["resources"].append(resources)
        return trainable

    def waited(_demand: Any, timeout: float, _what: str) -> None:
        seen["patience"].append(timeout)

    def distil(settings: Any, _progress: Progress) -> None:
        seen["distilled"].append(settings)
        name = Path(settings.output).name.partition("-seed")[0]
        seen["variants"].append(name)
        seen["trained on", name].append(settings.trajectories)

    def loaded(_model: str, **options: Any) -> Any:
        for name in ("dtype", "device", "max_batch_size"):
            seen[name].append(options[name])
        return SimpleNamespace()

    class Problems:
        def __init__(self, name: str) -> None:
            seen["task"].append(name)
            self.task = load_task(name)

        def problems(self, split: Any, count: int) -> Any:
            seen["split"].append(split)
            seen["count"].append(count)
            return []

    def evaluated(_llm: Any, _task: Any, _problems: Any, max_tokens: int, *, progress: Any, decoder: Any) -> Any:
        seen["max_tokens"].append(max_tokens)
        seen["decoders"].append(decoder)
        sample = EvaluatedSample("id", "", "1", "1", True, 30, 10, 1, "stop")
        labels = {"model": "m", "decoder": decoder.name, "task": "t", "settings": decoding_settings(decoder)}
        labels |= {"max_tokens": max_tokens, "temperature": 0.0, "seed": 0, "warmup": 0, "max_batch_size": 5}
        return summarise([sample], 1.0, **labels)

    def reported(design: Any, *_: Any) -> Any:
        seen["compared at"].append(design.settings.reference_threshold)
        return SimpleNamespace(write=lambda folder: seen["output"].append(folder))

    patch.setattr(verb.tune, "with_parameters", lambda function, **kept: lambda config: function(config, **kept))
    patch.setattr(verb.tune, "with_resources", with_resources)
    patch.setattr(verb.tune, "grid_search", lambda numbers: numbers)
    patch.setattr(verb.tune, "Tuner", Tuner)
    patch.setattr(verb, "connect", lambda min_cpus: seen["cpus"].append(min_cpus))
    patch.setattr(verb, "wait_for_resources", waited)
    patch.setattr(verb, "make_report", reported)
    patch.setattr(verb, "can_plot", lambda *_: False)
    patch.setattr(trials, "distil_here", distil)
    patch.setattr(trials.DiffusionLLM, "from_pretrained", loaded)
    patch.setattr(trials, "load_task", Problems)
    patch.setattr(trials, "evaluate", evaluated)
    patch.setattr(trials.shutil, "rmtree", lambda folder, **_: seen["removed"].append(str(folder)))


@pytest.fixture(scope="module")
def seen(given: dict[str, Any]) -> Seen:
    found: Seen = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        _watch(patch, found)
        settings = build(AblateSettings, given)
        verb.run(settings, QUIET)
        found["removed"] = [folder for folder in found["removed"] if "/students/" in folder]  # not Ray Tune's own

        def written(chosen: Any, _progress: Any) -> str:
            found["prompts"].append(chosen.count)
            found["decoded with"].append(chosen)
            return str(given["trajectories"])

        patch.setattr(verb, "write_trajectories", written)
        verb._rows(make_design(settings.model_copy(update={"trajectories": None})), QUIET)
    return found


@pytest.mark.parametrize("name", AblateSettings.model_fields)
def test_every_setting_arrives_where_it_acts(name: str, given: dict[str, Any], seen: Seen) -> None:
    assert name in ARRIVES, f"{name}: a new setting needs a value of its own, and a look where it acts, in ARRIVES"
    value, look = ARRIVES[name]
    assert value is None or value != AblateSettings.model_fields[name].get_default(), "a default proves nothing"
    assert look(seen) == ("mine" if name in ("recipe", "variants_file") else given[name])


def test_the_teachers_rows_are_decoded_as_the_students_are(seen: Seen, given: dict[str, Any]) -> None:
    (chosen,) = seen["decoded with"]
    assert (chosen.teacher, chosen.prompts, chosen.max_tokens) == (given["teacher"], given["task"], 16)
    assert (chosen.device, chosen.gpus_per_actor, chosen.attempts) == ("cuda", 0.5, 1)


def test_the_recipe_and_each_row_are_trained_with_every_seed(seen: Seen, given: dict[str, Any]) -> None:
    trained = [(Path(s.output).name.partition("-seed")[0], s.seed) for s in seen["distilled"]]
    assert trained == [(name, seed) for seed in range(4) for name in ("recipe", "low-rank", "given-answers")]
    ranks = {name: settings.lora_rank for (name, _), settings in zip(trained, seen["distilled"], strict=True)}
    assert ranks == {"recipe": 4, "low-rank": 2, "given-answers": 4}
    assert {settings.max_rows for settings in seen["distilled"]} == {36}  # 4 of 40 answers are wrong
    assert {settings.device for settings in seen["distilled"]} == {"cuda"}
    assert {settings.cpus_per_actor for settings in seen["distilled"]} == {3}
    # The teacher alone is measured with the plain decoder as well.
    assert len(seen["decoders"]) == 3 + 12 * 2 and _threshold(seen["decoders"][0]) is None


ARMS = {
    "order-random": {"order"},
    "order-shuffled": {"order"},
    "order-reversed": {"order"},
    "order-inverted": {"order", "inverted_pairs"},
    "noise-fixed": {"noise_start", "noise_end", "noise_max"},
    "noise-reversed": {"noise_start", "noise_end"},
    "window-fixed": {"window_sizes"},
    "certainty-off": {"certainty_weight"},
    "complement-off": {"complement_weight"},
}


@pytest.fixture(scope="module")
def plans(rows: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainingPlan]:
    """What each arm of the built-in rows trains on: the plan of its first seed."""
    small = {"epochs": 2, "batch_size": 16, "micro_batch_size": 8, "lora_rank": 4, "max_rows": None}
    small |= {"objective": {"window_sizes": [8, 16]}}
    values = {"teacher": str(tiny_checkpoint), "trajectories": str(rows), "distill": small, "variants": [*ARMS]}
    values |= {"count": 2, "max_tokens": 16, "seeds": 2, "output": tmp_path_factory.mktemp("arms") / "out"}
    found = {}
    for trial in plan_trials(make_design(build(AblateSettings, values)), str(rows), None):
        if trial.distill is not None and trial.seed == 0:
            shape, family = student_family(trial.distill)
            # An answer without its stop token is drawn over as a whole, whatever windows are drawn over.
            endless = replace(family, stop_token_ids=(10**6,))
            found[trial.variant] = TrainingPlan(trial.distill, load(trial.distill, shape, family)[0], endless)
    return found


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_differs_from_the_recipe_in_what_it_names_alone(name: str, plans: dict[str, TrainingPlan]) -> None:
    recipe, arm = plans["recipe"].settings.model_dump(), plans[name].settings.model_dump()
    objective, other = recipe.pop("objective"), arm.pop("objective")
    assert {field for field in objective if objective[field] != other[field]} == ARMS[name] - {"inverted_pairs"}
    assert {field for field in recipe if recipe[field] != arm[field]} == {"output"}


def test_arms_train_on_the_same_rows_in_other_ways(plans: dict[str, TrainingPlan]) -> None:
    """The same rows in the same batches; what is hidden of them differs between the arms, and only there."""
    hidden: dict[str, list[tuple[int, ...]]] = {}
    batches: dict[str, list[tuple[str, ...]]] = {}
    masked: dict[str, list[float]] = {}
    for name, plan in plans.items():
        micros = [plan.micro_batch(number) for number in range(plan.max_steps * plan.micro_batches_per_step)]
        batches[name] = [micro.prompt_ids for micro in micros]
        masked[name] = [micro.mask_ratio for micro in micros]
        hidden[name] = [tuple(micro.rows[~micro.second]) for micro in micros]
    assert all(found == batches["recipe"] for found in batches.values())
    same = {name for name, found in hidden.items() if found == hidden["recipe"]}
    assert same == {"recipe", "certainty-off", "complement-off"}
    assert len({tuple(found) for found in hidden.values()}) == len(ARMS) + 1 - 2
    for name in ("order-shuffled", "order-reversed", "order-inverted"):  # as many, in the same windows
        assert masked[name] == masked["recipe"]
    assert {round(16 * ratio) for ratio in masked["noise-fixed"][-4:]} <= {8}
    assert not any(plans["complement-off"].micro_batch(number).second.any() for number in range(4))
    assert np.mean(masked["noise-reversed"][:4]) > np.mean(masked["recipe"][:4])
