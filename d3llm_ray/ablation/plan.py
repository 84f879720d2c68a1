"""Every student of an ablation, checked and named before the first is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from d3llm_ray.ablation.settings import AblateSettings
from d3llm_ray.ablation.variants import RECIPE, TEACHER, Variant, built_in, check, choose, read_variants
from d3llm_ray.config import build, merge, recipe_file
from d3llm_ray.decoding import Decoder, decoder, decoding_settings, read_decoder
from d3llm_ray.distillation.plan import TrainingPlan
from d3llm_ray.distillation.preparation import HOW, absolute, load
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.student import student_family
from d3llm_ray.errors import require
from d3llm_ray.evaluation.decoders import sweep_decoder
from d3llm_ray.evaluation.report import ANCHOR_DECODER
from d3llm_ray.models import ZOO_NAMES, read_configs, resolve_model
from d3llm_ray.models.checkpoint import fingerprint
from d3llm_ray.tasks import Problem, Task, load_task
from d3llm_ray.trajectories.schema import read_trajectories
from d3llm_ray.trajectories.storage import Location
from d3llm_ray.yaml_file import read_yaml

TINY_RECIPE = Path(__file__).with_name("tiny.yaml")
PLACES = {"teacher", "trajectories", "output"}  # a trial is named by what is there
THRESHOLD = "entropy_threshold"  # the setting that is swept


@dataclass(frozen=True)
class AblationTrial:
    """One model to measure: a student to be distilled first, or (`distill` None) the teacher as it is."""

    variant: str
    seed: int
    key: str  # a readable name made unique by a hash of all that its figures depend on
    model: str  # the student's folder, or the teacher
    decoders: tuple[Decoder, ...]
    distill: DistillSettings | None = None


@dataclass(frozen=True)
class Design:
    """What is compared with what, checked without data: the recipe's values, the rows and the measurements."""

    settings: AblateSettings
    recipe: Mapping[str, Any]  # values of `DistillSettings`
    variants: Mapping[str, Variant]  # without the recipe itself

    @property
    def teacher(self) -> str:
        name = str(self.recipe["teacher"])
        return name if name in ZOO_NAMES else str(resolve_model(name).resolve())

    @property
    def needs_reference_answers(self) -> bool:
        return any(variant.reference_answers for variant in self.variants.values())

    @cached_property
    def task(self) -> Task:
        return load_task(self.settings.task)

    @cached_property
    def problems(self) -> list[Problem]:
        return self.task.problems(self.settings.split, self.settings.count)

    @cached_property
    def decoders(self) -> tuple[Decoder, ...]:
        """The decoder at every threshold."""
        base = read_decoder(self.settings.decoder, **self.settings.decoder_settings)
        require(
            THRESHOLD in base.settings(),
            "decoder",
            self.settings.decoder,
            f"one with the setting {THRESHOLD}",
        )
        return tuple(sweep_decoder(base, {THRESHOLD: list(self.settings.thresholds)}))


def make_design(settings: AblateSettings) -> Design:
    """Read the recipe and the rows. `InputError` for what no student could be trained or measured with."""
    recipe: dict[str, Any] = {
        **merge(
            read_yaml(recipe_file(settings.recipe or TINY_RECIPE, DistillSettings, "recipe"), "recipe"),
            settings.distill,
        ),
        **({"teacher": settings.teacher} if settings.teacher else {}),
        "trajectories": settings.trajectories or "",
        "output": "",
        # In its trial's process, with the trial's resources.
        "workers": 1,
        "device": settings.device,
        "cpus_per_actor": settings.cpus_per_actor,
    }
    defaults = build(DistillSettings, recipe, "distill")
    recipe["teacher"] = defaults.teacher
    known = read_variants(settings.variants_file) if settings.variants_file else built_in(defaults)
    variants = choose(known, settings.variants)
    check(variants, recipe)
    design = Design(settings, recipe, variants)
    family = read_configs(design.teacher)[1]
    for chosen in (*design.decoders, decoder(ANCHOR_DECODER)):
        chosen.check(family)
    for problem in design.problems:
        require(problem.reference is not None, f"problem {problem.id}: reference", None, "the expected answer")
    return design


def plan_trials(design: Design, trajectories: str, reference_trajectories: str | None) -> list[AblationTrial]:
    """The teacher and all students, the students of a seed together: an interrupted grid has whole comparisons.

    All students have as many rows, and so as many steps: no more than have answers that are not wrong.
    """
    settings = design.settings
    sources = {False: trajectories, True: reference_trajectories}
    files = {path: _files(path) for path in sources.values() if path is not None}
    rows = min(_rows_not_wrong(path) for path in files)
    if design.recipe.get("max_rows") is not None:
        rows = min(rows, int(design.recipe["max_rows"]))
    require(rows > 0, "trajectories", ", ".join(files), "at least one row whose answer is not wrong")
    teacher = fingerprint(resolve_model(design.teacher))
    anchors = (decoder(ANCHOR_DECODER), *design.decoders)
    key = _key(settings, design, TEACHER, [teacher, [decoding_settings(anchor) for anchor in anchors]])
    trials = [AblationTrial(TEACHER, 0, key, design.teacher, anchors)]
    recipe_row = Variant(claim=RECIPE)
    for seed in range(settings.seeds):
        for name, variant in {RECIPE: recipe_row, **design.variants}.items():
            source = sources[variant.reference_answers]
            assert source is not None
            given = {"teacher": design.teacher, "trajectories": source, "max_rows": rows, "seed": seed}
            distill = absolute(build(DistillSettings, {**merge(dict(design.recipe), variant.changes), **given}))
            what = distill.model_dump(mode="json", exclude=PLACES | HOW)
            decoders = [decoding_settings(chosen) for chosen in design.decoders]
            key = _key(settings, design, f"{name}-seed{seed}", [teacher, files[source], what, decoders])
            student = str((settings.output / "students" / key).absolute())
            distill = distill.model_copy(update={"output": student})
            trials.append(AblationTrial(name, seed, key, student, design.decoders, distill))
    return trials


def check_trials(trials: Sequence[AblationTrial]) -> int:
    """The optimizer steps of every student. `InputError` where its rows cannot be trained on, or for another number."""
    steps: dict[int, str] = {}
    for trial in trials:
        if trial.distill is None or trial.seed > 0:  # other seeds read the same rows
            continue
        shape, family = student_family(trial.distill)
        samples, _ = load(trial.distill, shape, family)
        steps[TrainingPlan(trial.distill, samples, family).max_steps] = trial.variant
    require(len(steps) == 1, "variants", f"{steps} by optimizer steps", "rows that all take as many")
    return next(iter(steps))


def _rows_not_wrong(path: str) -> int:
    """Rows that `keep: correct` keeps."""
    return pc.sum(pc.fill_null(read_trajectories(path)["is_correct"], True)).as_py() or 0


def _key(settings: AblateSettings, design: Design, name: str, content: list[Any]) -> str:
    options = settings.model_dump(mode="json", include={"max_tokens", "max_batch_size", "dtype"})
    asked = [[problem.messages, problem.reference] for problem in design.problems]
    digest = hashlib.sha256(json.dumps([content, options, asked], sort_keys=True).encode()).hexdigest()
    return f"{name}-{digest[:10]}"


def _files(path: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of a trajectory folder: written again, it is another one."""
    location = Location.of(path, "trajectories")
    files = location.files(".parquet") if location.is_folder else [location]
    return [(file.path.rpartition("/")[2], file.info.size, file.info.mtime_ns) for file in files]


def file_digest(path: str) -> str:
    """A short name of a trajectory folder's content."""
    return hashlib.sha256(json.dumps(_files(path)).encode()).hexdigest()[:10]
