"""One trial: distil a student in this process, measure it, and leave a record. Safe to repeat."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from d3llm_ray.ablation.plan import AblationTrial
from d3llm_ray.ablation.settings import AblateSettings
from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.distillation.local import distil_here
from d3llm_ray.evaluation.evaluate import evaluate
from d3llm_ray.evaluation.rows import EvaluationRow, unanswered
from d3llm_ray.progress import Progress
from d3llm_ray.report import write_text
from d3llm_ray.tasks import load_task

Measure = Callable[[AblationTrial, AblateSettings], None]


@dataclass(frozen=True)
class Record:
    """What a finished trial leaves: a row for each decoder, labelled by the trial's key."""

    variant: str
    seed: int
    seconds: dict[str, float]  # of the stages "distill" and "evaluate"
    rows: tuple[EvaluationRow, ...]
    unanswered: tuple[str, ...] = ()  # problems that some row has no answer to, with the reason


def record_file(settings: AblateSettings, trial: AblationTrial) -> Path:
    """Where a trial's record is; it is there when the trial is finished."""
    return settings.output / "trials" / f"{trial.key}.json"


def write_record(
    settings: AblateSettings, trial: AblationTrial, seconds: dict[str, float], rows: Sequence[EvaluationRow]
) -> None:
    """Write the trial's record; `rows` come in the order of its decoders."""
    content = {
        "variant": trial.variant,
        "seed": trial.seed,
        "distill": trial.distill and trial.distill.model_dump(mode="json"),
        "seconds": seconds,
        "rows": [replace(row, model=trial.key).to_dict() for row in rows],
        "unanswered": list(dict.fromkeys(text for row in rows for text in unanswered(row.samples))),
    }
    path = record_file(settings, trial)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content) + "\n")


def read_record(path: Path) -> Record:
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = tuple(EvaluationRow(**row) for row in content["rows"])
    lost = tuple(content.get("unanswered", ()))
    return Record(content["variant"], content["seed"], content["seconds"], rows, lost)


def run_trial(
    config: dict[str, Any], trials: Sequence[AblationTrial], settings: AblateSettings, measure: Measure
) -> None:
    """Ray Tune's trainable: carry out the trial `config["number"]`. `settings.output` is absolute."""
    measure(trials[config["number"]], settings)


def measure(trial: AblationTrial, settings: AblateSettings) -> None:
    """Distil the trial's student, if it is one, decode the problems with every decoder and write the record."""
    if settings.device == "cpu":
        torch.set_num_threads(settings.cpus_per_actor)
    quiet = Progress(quiet=True)
    started = time.perf_counter()
    if trial.distill is not None:
        distil_here(trial.distill, quiet)
    distilled = time.perf_counter()
    task = load_task(settings.task)
    problems = task.problems(settings.split, settings.count)
    llm = DiffusionLLM.from_pretrained(
        trial.model,
        decoder=trial.decoders[0],
        dtype=settings.dtype,
        device=settings.device,
        max_batch_size=settings.max_batch_size,
    )
    rows = [
        evaluate(llm, task, problems, settings.max_tokens, progress=quiet, decoder=decoder)
        for decoder in trial.decoders
    ]
    seconds = {"distill": distilled - started, "evaluate": time.perf_counter() - distilled}
    write_record(settings, trial, seconds, rows)
    if trial.distill is not None and not settings.keep_students:
        shutil.rmtree(trial.model)
