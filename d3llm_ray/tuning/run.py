"""The verb `tune`: search decoding settings on validation problems and write the best as YAML."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from d3llm_ray.cluster import connect
from d3llm_ray.config import to_yaml
from d3llm_ray.decoding import Decoder, decoding_settings, is_settings_file, written_settings
from d3llm_ray.decoding.presets import plain_decoder
from d3llm_ray.device import check_device_name
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.evaluate import check_references
from d3llm_ray.evaluation.pool import EnginePool, EngineWork, engine_pool
from d3llm_ray.evaluation.rows import check_answered, unanswered
from d3llm_ray.models import read_configs, resolve_model
from d3llm_ray.models.checkpoint import fingerprint
from d3llm_ray.output_folder import check_folder, sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.report import digest, versions, write_text
from d3llm_ray.tasks import Problem, load_task
from d3llm_ray.tuning.anchor import Anchor, known_anchor, read_anchor, write_anchor
from d3llm_ray.tuning.held_out import HeldOut, HeldOutRun, compare
from d3llm_ray.tuning.objective import SearchObjective, best_trial
from d3llm_ray.tuning.outcomes import outcomes_of, read_outcomes, unanswered_at, write_outcomes
from d3llm_ray.tuning.published import published_settings
from d3llm_ray.tuning.records import CHOSEN, read_unanswered, write_records
from d3llm_ray.tuning.search import SEARCH_FOLDER, search
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.tuning.space import SearchSpace, read_space

ANCHOR_FILE = "anchor.yaml"
MARKER = "tune.yaml"


@sole_writer
def run(settings: TuneSettings, progress: Progress | None = None, errors: Literal["raise", "return"] = "raise") -> Path:
    """Search, write and return the path of the chosen decoding settings, `settings.output / "settings.yaml"`.

    Beside it: `tune.yaml`, `space.yaml`, `model.json`, `problems.json`, for an `anchor_model` `anchor_model.json` and
    for a decoder from a file `decoder.json` (what was asked), `anchor.yaml`, `trials.csv`, `trials.json`,
    `pareto.json`, `report.md`, `pareto.png`, `heat_map.png` and Ray Tune's own folder `search`. A search that is
    complete is not repeated, an interrupted one goes on, and a folder that holds another search is refused.

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
    family = read_configs(settings.model)[1]
    space.base().check(family)
    plain = plain_decoder(read_configs(settings.anchor_model or settings.model)[1])
    task = load_task(settings.task, settings.data_dir)
    task.check_judge()
    problems = task.problems(settings.split, settings.count + settings.held_out)
    unseen = held_out_numbers(problems, settings)
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
    if len(unseen) < settings.held_out:
        progress.note(f"held_out: {len(unseen)} problems instead of {settings.held_out}: {settings.task} has no others")
    settings = settings.model_copy(update={"count": min(settings.count, len(problems))})  # a file may have fewer
    work = _work(settings, len(problems), space.decoding_settings({}))
    connect()
    anchor_file = settings.output / ANCHOR_FILE
    key = digest([asked, decoding_settings(plain), versions()])
    anchor = Anchor(*settings.anchor, key) if settings.anchor else known_anchor(anchor_file, key, progress)
    if anchor is None and settings.anchor_model is not None:  # before the model's own evaluators take the room
        with engine_pool(settings.model_copy(update={"model": settings.anchor_model})) as pool:
            anchor = _measure_anchor(settings, pool, work, plain, unseen, key, progress)
    with engine_pool(settings) as pool:
        if anchor is None:
            anchor = _measure_anchor(settings, pool, work, plain, unseen, key, progress)
        objective = SearchObjective(settings.metric, (anchor.tpf, anchor.accuracy), settings.max_accuracy_drop)
        most = math.ceil(settings.trials / 2)  # the others are for the sampler
        points = space.first_points(published_settings(family.name, space.base().name), most)
        trials = search(settings, space, points, objective, pool, work, progress)
        chosen = space.decoding_settings(best_trial(trials).values)
        held_out = _compare(objective, anchor, chosen, pool, work, unseen, progress) if unseen else None
    path = write_records(settings.output, space, objective, trials, held_out)
    if held_out is not None:
        progress.note(held_out.verdict)
    if errors == "raise":
        check_answered(_unanswered(settings.output), settings.output / "trials.json")
    return path


def held_out_numbers(problems: Sequence[Problem], settings: TuneSettings) -> list[int]:
    """The numbers of the problems behind those of the search, without those that ask the same as one of these.

    Raises:
        InputError: too few problems for the evaluators.
    """
    searched, behind = problems[: settings.count], problems[settings.count :]
    if len(searched) < settings.actors:
        raise InputError(f"actors: got {settings.actors} for {len(searched)} problems; accepted: at most one a problem")
    seen = {_question(problem) for problem in searched}
    return [settings.count + number for number, problem in enumerate(behind) if _question(problem) not in seen]


def _question(problem: Problem) -> str:
    return json.dumps([problem.messages, problem.text, problem.prefix])


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


def _work(settings: TuneSettings, count: int, decoding: dict[str, Any]) -> EngineWork:
    """The problems of the search and those behind them, with the settings that are not searched."""
    sampling = {name: getattr(settings, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    warmup = 1 if settings.metric.endswith("tps") else 0  # nothing else depends on time
    options = {"data_dir": settings.data_dir}
    return EngineWork(settings.task, settings.split, count, decoding, sampling, warmup, options)


def _measure_anchor(
    settings: TuneSettings,
    pool: EnginePool,
    work: EngineWork,
    plain: Decoder,
    unseen: list[int],
    key: str,
    progress: Progress,
) -> Anchor:
    decoding = decoding_settings(plain)
    with progress.stage("anchor", settings.count + len(unseen), "problem"):
        row = pool.measure(replace(work, decoding_settings=decoding), range(settings.count))
        progress.update(settings.count, accuracy=row.accuracy, tpf=row.tpf)
        anchor = Anchor(row.tpf, row.accuracy, key, tuple(unanswered(row.samples)))
        if unseen:
            run = _held_out_run("vanilla", pool, work, decoding, unseen)
            progress.update(settings.count + len(unseen))
            anchor = replace(
                anchor,
                unanswered=(*anchor.unanswered, *run.unanswered),
                held_out=write_outcomes(run.outcomes),
                held_out_tps=run.tps,
            )
    write_anchor(settings.output / ANCHOR_FILE, anchor)
    return anchor


def _compare(
    objective: SearchObjective,
    anchor: Anchor,
    decoding: dict[str, Any],
    pool: EnginePool,
    work: EngineWork,
    unseen: list[int],
    progress: Progress,
) -> HeldOut:
    with progress.stage("held out", 2 * len(unseen), "problem"):
        own = _held_out_run("own", pool, work, work.decoding_settings, unseen)
        progress.update(len(unseen))
        chosen = _held_out_run("chosen", pool, work, decoding, unseen)
        progress.update(2 * len(unseen))
    plain = None
    if anchor.held_out:
        plain = HeldOutRun("vanilla", {}, read_outcomes(anchor.held_out), anchor.held_out_tps)
    return compare(chosen, own, plain, objective, int(work.sampling["seed"]))


def _held_out_run(
    name: str, pool: EnginePool, work: EngineWork, decoding: Mapping[str, Any], unseen: list[int]
) -> HeldOutRun:
    row = pool.measure(replace(work, decoding_settings=decoding), unseen)
    named = tuple(unanswered_at(row.samples, unseen))
    return HeldOutRun(name, row.settings, outcomes_of(row.samples), row.tps, named)
