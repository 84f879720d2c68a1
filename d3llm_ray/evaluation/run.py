"""The verb `evaluate`: measure every pair on every task, then write the report, the answers and the plot.

A measurement is kept under a name made of all that it depends on, so that a run that was interrupted, or one with
another decoder added, measures only what is missing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from d3llm_ray.config import DecodingOptions
from d3llm_ray.decoding import Decoder, DiffusionLLM, decoding_settings, override_known, read_decoder
from d3llm_ray.device import check_device, check_device_name
from d3llm_ray.errors import InputError, require
from d3llm_ray.evaluation.decoders import decoder_label, distinct, sweep_decoder
from d3llm_ray.evaluation.evaluate import check_references, evaluate
from d3llm_ray.evaluation.kept import ENDING, OLD_ENDING, measurement_key, read_row, write_row
from d3llm_ray.evaluation.prompts import first_prompt, show_prompt
from d3llm_ray.evaluation.report import EvaluationReport, score
from d3llm_ray.evaluation.rows import EvaluationRow, check_answered, unanswered
from d3llm_ray.evaluation.settings import EvaluateSettings
from d3llm_ray.models import read_configs, resolve_model
from d3llm_ray.models.checkpoint import fingerprint
from d3llm_ray.output_folder import claim, sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.report import can_plot, digest
from d3llm_ray.tasks import EMBEDDED, PUBLISHED, Problem, Task, load_task

if TYPE_CHECKING:
    from d3llm_ray.evaluation.endpoint import EndpointRows


@dataclass(frozen=True)
class _PlannedTask:
    """A task of the report. `place`: its name or its file's real path; `content`: digest of its problems."""

    task: Task
    label: str
    place: str
    problems: list[Problem]
    content: str


@dataclass(frozen=True)
class _PlannedRow:
    """What one row of the report stands for. `key` names its file, `place` its task."""

    model: str
    labels: tuple[str, str]
    decoder: Decoder
    place: str
    key: str


@sole_writer
def run(
    settings: EvaluateSettings, progress: Progress | None = None, errors: Literal["raise", "return"] = "raise"
) -> EvaluationReport:
    """Measure, score and write; returns the report.

    Files in `settings.output`: `evaluate.yaml` (these settings), `samples/*.parquet` (every answer, a file a row),
    `prompts/*.txt` (the first prompt of a task as a model reads it), `report.md`, `accuracy_vs_tpf.png` and, last of
    all, `report.json`.

    Raises:
        InputError: an unknown model, decoder, setting, task or device, a decoder that does not fit its model, labels
            that clash, a problem without a reference, what the server behind `url` does not take, or a folder that is
            not ours; before any model is loaded or asked.
        WorkError: the server behind `url` is not there, or has no room for long.
        IncompleteError: some problems have no answer and count as wrong; the report is written. Not with
            `errors="return"`: there they are counted only.
    """
    progress = progress or Progress()
    (check_device_name if settings.actors else check_device)(settings.device)
    tasks = _plan_tasks(settings)
    with _endpoint(settings, progress) as there:
        measurements = _plan(settings, tasks, there)
        claim(settings.output, "evaluate.yaml", settings)
        (settings.output / "samples").mkdir(exist_ok=True)
        rows = dict(_measure_all(settings, measurements, tasks, there, progress))
    measured = [rows[item.key] for item in measurements]
    report = score(measured, settings.anchors)
    if can_plot(plot := settings.output / "accuracy_vs_tpf.png"):
        from d3llm_ray.evaluation.plots import plot_report

        plot_report(report, plot)
    report.write(settings.output)
    named = [(f"{row.model}, {row.decoder}, {row.task}", unanswered(row.samples)) for row in measured]
    if errors == "raise":
        check_answered([f"{row}, {text}" for row, texts in named for text in texts], settings.output / "report.md")
    return report


@contextmanager
def _endpoint(settings: EvaluateSettings, progress: Progress) -> Iterator[EndpointRows | None]:
    """The server behind `url` while the block runs; None without one."""
    if settings.url is None:
        require(settings.api_key_file is None, "api_key_file", str(settings.api_key_file), "only with url")
        yield None
        return
    from d3llm_ray.evaluation.endpoint import endpoint  # here, as it needs what clients need

    with endpoint(settings, progress) as there:
        yield there


def _plan_tasks(settings: EvaluateSettings) -> dict[str, _PlannedTask]:
    """Every task by its place; a file under two names is one task, two files of one name are told apart."""
    names: dict[str, str] = {}
    for name in settings.tasks:
        names.setdefault(name if name in {**EMBEDDED, **PUBLISHED} else str(Path(name).resolve()), name)
    loaded = [load_task(name, settings.data_dir) for name in names.values()]
    labels = distinct([task.name for task in loaded], list(names.values()))
    tasks = {}
    for place, task, label in zip(names, loaded, labels, strict=True):
        problems = task.problems(settings.split, settings.count)
        check_references(problems)
        task.check_judge()
        tasks[place] = _PlannedTask(task, label, place, problems, digest([asdict(problem) for problem in problems]))
    return tasks


def _plan(settings: EvaluateSettings, tasks: dict[str, _PlannedTask], there: EndpointRows | None) -> list[_PlannedRow]:
    """Every measurement, in the order of the report, checked as far as is possible without weights."""
    planned, pairs = [], settings.all_pairs()
    bases = override_known([read_decoder(pair.decoder) for pair in pairs], settings.decoder_settings)
    names = [(pair.decoder, base.name) for pair, base in zip(pairs, bases, strict=True)]
    whole = [f"{preset} ({chosen})" for chosen, preset in names]
    decoder_labels = distinct([decoder_label(*name) for name in names], whole)
    options = settings.model_dump(mode="json", include={*DecodingOptions.model_fields, "warmup"})
    if settings.actors:  # seconds depend on them
        options |= settings.model_dump(mode="json", include={"actors", "cpus_per_actor", "gpus_per_actor"})
    if there:
        options["concurrency"] = settings.concurrency
    for pair, base, own_label in zip(pairs, bases, decoder_labels, strict=True):
        labels = (pair.model_label or Path(pair.model).name, pair.decoder_label or own_label)
        decoders = sweep_decoder(base.override(**pair.decoder_settings), settings.sweep)
        if there:
            for decoder, task in product(decoders, tasks.values()):
                there.check(pair.model, decoder, task.task)
            checkpoint = there.content(pair.model)
        else:
            folder = resolve_model(pair.model)
            checkpoint = [str(folder.resolve()), fingerprint(folder)]
            base.check(read_configs(pair.model)[1])
        for decoder in decoders:
            for task in tasks.values():
                content = [checkpoint, decoding_settings(decoder), task.place, task.content, options]
                key = measurement_key((*labels, task.task.name), content)
                planned.append(_PlannedRow(pair.model, labels, decoder, task.place, key))
    _check_labels(settings, planned)
    return list(dict.fromkeys(planned))


def _check_labels(settings: EvaluateSettings, planned: list[_PlannedRow]) -> None:
    models: dict[str, str] = {}
    for item in planned:
        if models.setdefault(item.labels[0], item.model) != item.model:
            raise InputError(
                f"pairs: {item.model!r} and {models[item.labels[0]]!r} are both called {item.labels[0]!r}; "
                "accepted: a model_label of its own for each"
            )
    for name in (*settings.anchors, *settings.anchors.values()):
        if name not in models:
            raise InputError(f"anchors: no model is called {name!r}; accepted: {', '.join(sorted(models))}")


def _measure_all(
    settings: EvaluateSettings,
    measurements: list[_PlannedRow],
    tasks: dict[str, _PlannedTask],
    there: EndpointRows | None,
    progress: Progress,
) -> Iterator[tuple[str, EvaluationRow]]:
    """Key and row of every measurement, read back where it was made before."""
    missing = []
    for item in sorted(measurements, key=lambda item: item.model):
        path, task = _file(settings, item), tasks[item.place]
        kept = read_row(path, [problem.id for problem in task.problems]) if path.is_file() else None
        if isinstance(kept, EvaluationRow):
            yield item.key, replace(kept, task=task.label)
            continue
        if kept is not None:
            progress.note(f"measured again, as {path} cannot be used: {kept}")
        elif (old := path.with_suffix(OLD_ENDING)).is_file():
            progress.note(f"measured again, as {old} cannot be used: answers are kept as {ENDING[1:]} now")
        missing.append(item)
    shown = defaultdict[tuple[str, str], list[str]](list)  # task and prompt -> the models that read it so
    for (model, label), (item, task) in _firsts(missing, tasks).items():
        look = there.first_prompt if there else first_prompt
        shown[label, look(item.model, task.problems[0])].append(model)
    for (label, text), models in shown.items():
        show_prompt(settings.output, models, label, text, progress)
    by_key = {item.key: item for item in missing}
    if there:
        found = _behind_url(there, missing, tasks)
    else:
        found = (_on_actors if settings.actors else _in_this_process)(settings, missing, tasks, progress)
    for key, row in found:
        item = by_key[key]
        row = replace(row, model=item.labels[0], decoder=item.labels[1], task=tasks[item.place].label)
        write_row(_file(settings, item), row)
        _file(settings, item).with_suffix(OLD_ENDING).unlink(missing_ok=True)
        yield key, row


def _file(settings: EvaluateSettings, item: _PlannedRow) -> Path:
    return settings.output / "samples" / f"{item.key}{ENDING}"


def _firsts(
    missing: list[_PlannedRow], tasks: dict[str, _PlannedTask]
) -> dict[tuple[str, str], tuple[_PlannedRow, _PlannedTask]]:
    """Each (model, task) that is to be measured, by its labels."""
    return {(item.labels[0], tasks[item.place].label): (item, tasks[item.place]) for item in missing}


def _behind_url(
    there: EndpointRows, missing: list[_PlannedRow], tasks: dict[str, _PlannedTask]
) -> Iterator[tuple[str, EvaluationRow]]:
    for item in missing:
        task = tasks[item.place]
        yield item.key, there.row(item.model, item.decoder, task.task, task.problems)


def _on_actors(
    settings: EvaluateSettings, missing: list[_PlannedRow], tasks: dict[str, _PlannedTask], progress: Progress
) -> Iterator[tuple[str, EvaluationRow]]:
    if not missing:
        return
    from d3llm_ray.evaluation.pool import EngineWork  # here, as they import Ray
    from d3llm_ray.evaluation.spread import ReportCell, measure_cells

    cells = []
    for item in missing:
        task = tasks[item.place]
        work = EngineWork(
            task=item.place,
            split=settings.split,
            count=settings.count,
            decoding_settings=decoding_settings(item.decoder),
            sampling=settings.model_dump(include={"max_tokens", "temperature", "top_p", "seed"}),
            warmup=settings.warmup,
            task_options={"data_dir": settings.data_dir},
        )
        cells.append(ReportCell(item.key, item.model, work, [problem.id for problem in task.problems]))
    yield from measure_cells(settings, cells, progress)


def _in_this_process(
    settings: EvaluateSettings, missing: list[_PlannedRow], tasks: dict[str, _PlannedTask], progress: Progress
) -> Iterator[tuple[str, EvaluationRow]]:
    """One model in memory at a time."""
    llm: DiffusionLLM | None = None
    loaded = ""
    for item in missing:
        task = tasks[item.place]
        if loaded != item.model:
            llm = None  # let the previous model go before the next one is read
            llm = DiffusionLLM.from_pretrained(
                item.model,
                decoder=item.decoder,
                dtype=settings.dtype,
                device=settings.device,
                max_batch_size=settings.max_batch_size,
            )
            loaded = item.model
        assert llm is not None
        row = evaluate(
            llm,
            task.task,
            task.problems,
            settings.max_tokens,
            settings.temperature,
            settings.seed,
            progress,
            settings.warmup,
            item.decoder,
            top_p=settings.top_p,
        )
        yield item.key, row
