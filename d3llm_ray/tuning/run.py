"""The verb `tune`: search decoding settings on validation problems and write the best as YAML."""

from __future__ import annotations

import json
from pathlib import Path

from d3llm_ray.cluster import connect
from d3llm_ray.config import read_yaml, to_yaml
from d3llm_ray.decoding import Decoder, decoding_settings, is_settings_file, written_settings
from d3llm_ray.decoding.presets import plain_decoder
from d3llm_ray.device import check_device_name
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.aup import Point
from d3llm_ray.models import read_configs, resolve_model
from d3llm_ray.models.checkpoint import fingerprint
from d3llm_ray.output_folder import check_folder, sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.report import write_text
from d3llm_ray.tasks import load_task
from d3llm_ray.tuning.evaluators import evaluator_pool
from d3llm_ray.tuning.objective import SearchObjective
from d3llm_ray.tuning.records import write_records
from d3llm_ray.tuning.search import search
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.tuning.space import SearchSpace, read_space
from d3llm_ray.tuning.trial import Pool, measure

ANCHOR_FILE = "anchor.yaml"
MARKER = "tune.yaml"


@sole_writer
def run(settings: TuneSettings, progress: Progress | None = None) -> Path:
    """Search, write and return the path of the chosen decoding settings, `settings.output / "settings.yaml"`.

    Beside it: `tune.yaml`, `space.yaml`, `model.json` and, for a decoder from a file, `decoder.json` (what was asked),
    `trials.csv`, `trials.json`, `pareto.png` and Ray Tune's own folder `search`. A search that is complete is not
    repeated, an interrupted one goes on, and a folder that holds another search is refused.

    Raises:
        InputError: an unknown model, task, decoder, setting or value; before Ray starts.
        RuntimeError: trials failed.
        KeyboardInterrupt: the search was stopped before its end; the next call goes on.
    """
    progress = progress or Progress()
    space = read_space(settings.space)
    check_device_name(settings.device)
    space.base().check(read_configs(settings.model)[1])
    plain = plain_decoder(read_configs(settings.anchor_model or settings.model)[1])
    problems = len(load_task(settings.task).problems(settings.split, settings.count))
    if problems < settings.actors:
        raise InputError(f"actors: got {settings.actors} for {problems} problems; accepted: at most one a problem")
    check_folder(settings.output, MARKER, TuneSettings).mkdir(parents=True, exist_ok=True)
    _claim(settings, space)
    chosen = settings.output / "settings.yaml"
    if chosen.is_file():
        return chosen
    connect()
    anchor = _known_anchor(settings)
    if anchor is None and settings.anchor_model is not None:  # before the model's own evaluators take the room
        with evaluator_pool(settings.model_copy(update={"model": settings.anchor_model})) as pool:
            anchor = _measure_anchor(settings, pool, plain, progress)
    with evaluator_pool(settings) as pool:
        if anchor is None:
            anchor = _measure_anchor(settings, pool, plain, progress)
        objective = SearchObjective(settings.metric, anchor, settings.max_accuracy_drop)
        trials = search(settings, space, objective, pool, progress)
    return write_records(settings.output, space, objective, trials)


def _claim(settings: TuneSettings, space: SearchSpace) -> None:
    """Write down what is searched, or check that the folder's earlier search is the same one."""
    model = json.dumps(fingerprint(resolve_model(settings.model)))
    texts = {MARKER: to_yaml(settings), "space.yaml": to_yaml(space), "model.json": model}
    if is_settings_file(space.decoder):  # the space holds its path only
        texts["decoder.json"] = json.dumps(written_settings(space.decoder))
    for name, text in texts.items():
        path = settings.output / name
        if not path.is_file():
            write_text(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise InputError(
                f"output: {path} belongs to another search; accepted: the same model and settings, or another folder"
            )


def _known_anchor(settings: TuneSettings) -> Point | None:
    """(TPF, accuracy) of the plain decoder, as given or as an earlier start of this search has measured it."""
    path = settings.output / ANCHOR_FILE
    if settings.anchor is not None or not path.is_file():
        return settings.anchor
    values = read_yaml(path)
    return values["tpf"], values["accuracy"]


def _measure_anchor(settings: TuneSettings, pool: Pool, plain: Decoder, progress: Progress) -> Point:
    with progress.stage("anchor", settings.count, "problem"):
        row = measure(pool, decoding_settings(plain))
        progress.update(settings.count, accuracy=row.accuracy, tpf=row.tpf)
    write_text(settings.output / ANCHOR_FILE, f"tpf: {row.tpf!r}\naccuracy: {row.accuracy!r}\n")
    return row.tpf, row.accuracy
