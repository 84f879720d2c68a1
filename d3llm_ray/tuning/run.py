"""The verb `tune`: search decoding settings on validation problems and write the best as YAML."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from d3llm_ray.cluster import connect
from d3llm_ray.config import to_yaml
from d3llm_ray.decoding import Decoder, decoding_settings, is_settings_file, written_settings
from d3llm_ray.decoding.presets import plain_decoder
from d3llm_ray.device import check_device_name
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.evaluate import check_references
from d3llm_ray.evaluation.rows import check_answered, unanswered
from d3llm_ray.models import read_configs, resolve_model
from d3llm_ray.models.checkpoint import fingerprint
from d3llm_ray.output_folder import check_folder, sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.report import digest, versions, write_text
from d3llm_ray.tasks import Problem, load_task
from d3llm_ray.tuning.anchor import Anchor, known_anchor, read_anchor, write_anchor
from d3llm_ray.tuning.evaluators import evaluator_pool
from d3llm_ray.tuning.objective import SearchObjective
from d3llm_ray.tuning.records import CHOSEN, read_unanswered, write_records
from d3llm_ray.tuning.search import SEARCH_FOLDER, search
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.tuning.space import SearchSpace, read_space
from d3llm_ray.tuning.trial import Pool, measure

ANCHOR_FILE = "anchor.yaml"
MARKER = "tune.yaml"


@sole_writer
def run(settings: TuneSettings, progress: Progress | None = None, errors: Literal["raise", "return"] = "raise") -> Path:
    """Search, write and return the path of the chosen decoding settings, `settings.output / "settings.yaml"`.

    Beside it: `tune.yaml`, `space.yaml`, `model.json`, `problems.json`, for an `anchor_model` `anchor_model.json` and
    for a decoder from a file `decoder.json` (what was asked), `anchor.yaml`, `trials.csv`, `trials.json`, `pareto.png`
    and Ray Tune's own folder `search`. A search that is complete is not repeated, an interrupted one goes on, and a
    folder that holds another search is refused.

    Raises:
        InputError: an unknown model, task, decoder, setting or value; before Ray starts.
        IncompleteError: some problems had no answer and counted as wrong; everything is written. Not with
            `errors="return"`.
        RuntimeError: trials failed.
        KeyboardInterrupt: the search was stopped before its end; the next call goes on.
    """
    progress = progress or Progress()
    space = read_space(settings.space)
    check_device_name(settings.device)
    space.base().check(read_configs(settings.model)[1])
    plain = plain_decoder(read_configs(settings.anchor_model or settings.model)[1])
    problems = load_task(settings.task, settings.data_dir).problems(settings.split, settings.count)
    if len(problems) < settings.actors:
        raise InputError(f"actors: got {settings.actors} for {len(problems)} problems; accepted: at most one a problem")
    check_references(problems)
    check_folder(settings.output, MARKER, TuneSettings).mkdir(parents=True, exist_ok=True)
    asked = _asked(settings, space, problems)
    _claim(settings.output, asked)
    if (settings.output / CHOSEN).is_file():
        try:
            named = _unanswered(settings.output)
        except InputError as error:
            progress.note(f"searched again: {error}")
        else:
            if errors == "raise":
                check_answered(named, settings.output / "trials.json")
            return settings.output / CHOSEN
    connect()
    anchor_file = settings.output / ANCHOR_FILE
    key = digest([asked, decoding_settings(plain), versions()])
    anchor = Anchor(*settings.anchor, key) if settings.anchor else known_anchor(anchor_file, key, progress)
    if anchor is None and settings.anchor_model is not None:  # before the model's own evaluators take the room
        with evaluator_pool(settings.model_copy(update={"model": settings.anchor_model})) as pool:
            anchor = _measure_anchor(settings, pool, plain, key, progress)
    with evaluator_pool(settings) as pool:
        if anchor is None:
            anchor = _measure_anchor(settings, pool, plain, key, progress)
        objective = SearchObjective(settings.metric, (anchor.tpf, anchor.accuracy), settings.max_accuracy_drop)
        trials = search(settings, space, objective, pool, progress)
    path = write_records(settings.output, space, objective, trials)
    if errors == "raise":
        check_answered(_unanswered(settings.output), settings.output / "trials.json")
    return path


def _unanswered(output: Path) -> list[str]:
    """The problems that the anchor or a trial did not answer; `InputError` where the records are damaged."""
    file = output / ANCHOR_FILE
    return list(dict.fromkeys([*(read_anchor(file).unanswered if file.is_file() else ()), *read_unanswered(output)]))


def _asked(settings: TuneSettings, space: SearchSpace, problems: list[Problem]) -> dict[str, str]:
    """All that the search depends on, as texts by the names of the files that keep them; the marker first."""
    asked = {
        MARKER: to_yaml(settings),
        "space.yaml": to_yaml(space),
        "model.json": json.dumps(fingerprint(resolve_model(settings.model))),
        "problems.json": json.dumps({"digest": digest([asdict(problem) for problem in problems])}),
    }
    if settings.anchor_model is not None:
        asked["anchor_model.json"] = json.dumps(fingerprint(resolve_model(settings.anchor_model)))
    if is_settings_file(space.decoder):  # the space holds its path only
        asked["decoder.json"] = json.dumps(written_settings(space.decoder))
    return asked


def _claim(output: Path, asked: dict[str, str]) -> None:
    """Write down what is searched, or check that the folder's earlier search is the same one."""
    begun = any((output / name).exists() for name in (ANCHOR_FILE, SEARCH_FOLDER, CHOSEN))
    for name, text in asked.items():
        path = output / name
        if not path.is_file() and not begun:
            write_text(path, text)
        elif not path.is_file() or path.read_bytes() != text.encode():
            raise InputError(
                f"output: {path} belongs to another search; accepted: the same model, problems and settings, or "
                "another folder"
            )


def _measure_anchor(settings: TuneSettings, pool: Pool, plain: Decoder, key: str, progress: Progress) -> Anchor:
    with progress.stage("anchor", settings.count, "problem"):
        row = measure(pool, decoding_settings(plain))
        progress.update(settings.count, accuracy=row.accuracy, tpf=row.tpf)
    anchor = Anchor(row.tpf, row.accuracy, key, tuple(unanswered(row.samples)))
    write_anchor(settings.output / ANCHOR_FILE, anchor)
    return anchor
