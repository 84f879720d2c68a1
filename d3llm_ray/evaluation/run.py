"""The verb `evaluate`: measure every pair on every task, then write the report, the answers and the plot.

A measurement is kept under a name made of all that it depends on, so that a run that was interrupted, or one with
another decoder added, measures only what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from d3llm_ray.decoding import Decoder, DiffusionLLM, decoding_settings, override_known, read_decoder
from d3llm_ray.device import check_device
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.decoders import decoder_label, sweep_decoder
from d3llm_ray.evaluation.evaluate import evaluate
from d3llm_ray.evaluation.plots import plot_report
from d3llm_ray.evaluation.report import EvaluationReport, score
from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow
from d3llm_ray.evaluation.settings import EvaluateSettings
from d3llm_ray.models import read_configs, resolve_model
from d3llm_ray.models.checkpoint import fingerprint
from d3llm_ray.output_folder import claim, sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.report import digest, write_text
from d3llm_ray.tasks import Problem, Task, load_task


@dataclass(frozen=True)
class _PlannedRow:
    """What one row of the report stands for. `key` names its file."""

    model: str
    labels: tuple[str, str]
    decoder: Decoder
    task: str
    key: str


@sole_writer
def run(settings: EvaluateSettings, progress: Progress | None = None) -> EvaluationReport:
    """Measure, score and write; returns the report.

    Files in `settings.output`: `evaluate.yaml` (these settings), `samples/*.jsonl` (every answer, a file a row),
    `report.md`, `accuracy_vs_tpf.png` and, last of all, `report.json`.

    Raises:
        InputError: an unknown model, decoder, setting, task or device, a decoder that does not fit its model, labels
            that clash, or a folder that is not ours; before any model is loaded.
    """
    progress = progress or Progress()
    check_device(settings.device)
    tasks = {name: load_task(name) for name in settings.tasks}
    problems = {name: task.problems(settings.split, settings.count) for name, task in tasks.items()}
    measurements = _plan(settings, problems)
    claim(settings.output, "evaluate.yaml", settings)
    (settings.output / "samples").mkdir(exist_ok=True)
    rows = dict(_measure_all(settings, measurements, tasks, problems, progress))
    report = score([rows[item.key] for item in measurements], settings.anchors)
    plot_report(report, settings.output / "accuracy_vs_tpf.png")
    report.write(settings.output)
    return report


def _plan(settings: EvaluateSettings, problems: dict[str, list[Problem]]) -> list[_PlannedRow]:
    """Every measurement, in the order of the report, checked as far as is possible without weights."""
    planned, pairs = [], settings.all_pairs()
    bases = override_known([read_decoder(pair.decoder) for pair in pairs], settings.decoder_settings)
    for pair, base in zip(pairs, bases, strict=True):
        checkpoint = fingerprint(resolve_model(pair.model))
        model = pair.model_label or Path(pair.model).name
        labels = (model, pair.decoder_label or decoder_label(pair.decoder, base.name))
        base.check(read_configs(pair.model)[1])
        for decoder in sweep_decoder(base.override(**pair.decoder_settings), settings.sweep):
            for task in settings.tasks:
                content = [labels, checkpoint, decoding_settings(decoder), [problem.id for problem in problems[task]]]
                key = _key(settings, (*labels, Path(task).stem), content)
                planned.append(_PlannedRow(pair.model, labels, decoder, task, key))
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


def _key(settings: EvaluateSettings, names: tuple[str, ...], content: list[Any]) -> str:
    """A readable file name, made unique by a hash of all that the measurement depends on."""
    options = settings.model_dump(
        mode="json", include={"max_tokens", "temperature", "seed", "max_batch_size", "warmup", "dtype", "device"}
    )
    slug = "".join(letter if letter.isalnum() else "-" for letter in "-".join(names))
    return f"{slug}-{digest([content, options])}"


def _measure_all(
    settings: EvaluateSettings,
    measurements: list[_PlannedRow],
    tasks: dict[str, Task],
    problems: dict[str, list[Problem]],
    progress: Progress,
) -> Iterator[tuple[str, EvaluationRow]]:
    """Key and row of every measurement, read back where it was made before; one model in memory at a time."""
    llm: DiffusionLLM | None = None
    loaded = ""
    for item in sorted(measurements, key=lambda item: item.model):
        path = settings.output / "samples" / f"{item.key}.jsonl"
        if path.is_file():
            yield item.key, _read(path)
            continue
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
            tasks[item.task],
            problems[item.task],
            settings.max_tokens,
            settings.temperature,
            settings.seed,
            progress,
            settings.warmup,
            item.decoder,
        )
        row = replace(row, model=item.labels[0], decoder=item.labels[1])
        _write(path, row)
        yield item.key, row


def _write(path: Path, row: EvaluationRow) -> None:
    """First line: the row; then a line a sample."""
    lines = [row.to_dict(), *(asdict(sample) for sample in row.samples)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _read(path: Path) -> EvaluationRow:
    with path.open(encoding="utf-8") as lines:
        first, *rest = (json.loads(line) for line in lines)
    return EvaluationRow(**first, samples=tuple(EvaluatedSample(**line) for line in rest))
