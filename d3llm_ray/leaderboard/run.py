"""The verb `leaderboard`: choose every system's settings on validation problems, measure it on test problems, rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from d3llm_ray.config import build
from d3llm_ray.decoding import decoding_settings
from d3llm_ray.evaluation import run as evaluation
from d3llm_ray.evaluation.rows import EvaluationRow, check_answered, unanswered
from d3llm_ray.evaluation.settings import EvaluateSettings, MeasureOptions
from d3llm_ray.leaderboard.board import Board, score_tables
from d3llm_ray.leaderboard.points import MethodPoints, PointsTable, open_points
from d3llm_ray.leaderboard.ranking import Standing, rank, to_markdown
from d3llm_ray.leaderboard.settings import LeaderboardSettings
from d3llm_ray.leaderboard.standings import MeasuredSystem, best_accuracy, choose
from d3llm_ray.leaderboard.systems import PlannedSystem, SystemRun, distinct_runs, plan_systems, read_systems
from d3llm_ray.leaderboard.write import write_board
from d3llm_ray.output_folder import claim, sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.report import write_text
from d3llm_ray.yaml_file import dump_yaml


@dataclass(frozen=True)
class RankedTask:
    """A task as it is asked for, the name it has in reports, and the run that each system has chosen for it."""

    place: str
    label: str
    chosen: dict[str, SystemRun]


@sole_writer
def run(settings: LeaderboardSettings, progress: Progress | None = None) -> Board:
    """Measure, rank and write; returns the board.

    Files in `settings.output`: `leaderboard.yaml` (these settings), `validation/` and `test/TASK/` (reports of
    `evaluate` with every answer; an interrupted run goes on from them), `chosen/SYSTEM-TASK.yaml` (decoding settings
    for `serve` and `evaluate`), `points/`, pictures, `report.md` and, last, `report.json`.

    Raises:
        InputError: a systems or points file, a model, decoder, task or setting that is none, or that do not fit; before
            any model is loaded.
        IncompleteError: some test problems have no answer and count as wrong; the report is written.
    """
    progress = progress or Progress()
    planned = plan_systems(read_systems(settings.systems))
    beside = [open_points(name) for name in settings.published]
    claim(settings.output, "leaderboard.yaml", settings)
    tasks = _choose_settings(settings, planned, progress)
    standings: list[Standing] = []
    rows: list[EvaluationRow] = []
    for task in tasks:
        measured = _measure(settings, planned, task, progress)
        standings += rank(task.label, measured)
        rows += [row for each in measured.values() for row in (each.anchor, each.own)]
    measured_table = _points_table(planned, standings, settings)
    scored = score_tables([measured_table, *beside])
    board = replace(scored, above=to_markdown(standings), more={"standings": [each.to_dict() for each in standings]})
    write_board(board, settings.output)
    failures = {
        f"{row.model}, {row.decoder}, {row.task}, {text}": 1 for row in rows for text in unanswered(row.samples)
    }
    check_answered(list(failures), settings.output / "report.md")
    return board


def _evaluate(
    settings: LeaderboardSettings,
    runs: Sequence[SystemRun],
    tasks: Sequence[str],
    split: Literal["test", "validation"],
    count: int,
    output: Path,
    progress: Progress,
) -> dict[str, list[EvaluationRow]]:
    """Rows by the key of a run, one a task."""
    own: dict[str, Any] = {"pairs": [run.pair for run in runs], "tasks": list(tasks), "split": split, "count": count}
    given = EvaluateSettings(**settings.model_dump(include=set(MeasureOptions.model_fields)), **own, output=output)
    rows = evaluation.run(given, progress, errors="return").rows
    each = len(rows) // len(runs)
    return {run.key: list(rows[number * each : (number + 1) * each]) for number, run in enumerate(runs)}


def _choose_settings(
    settings: LeaderboardSettings, planned: Sequence[PlannedSystem], progress: Progress
) -> list[RankedTask]:
    """What every system decodes each task with; its settings files are written."""
    runs = list(distinct_runs(run for system in planned for run in system.runs()).values())
    places = list(dict.fromkeys(settings.tasks))
    output = settings.output / "validation"
    rows = _evaluate(settings, runs, places, "validation", settings.validation_count, output, progress)
    tasks = []
    for number, place in enumerate(places):
        on_task = {key: of_run[number] for key, of_run in rows.items()}
        best = best_accuracy(list(on_task.values()))
        label = next(iter(on_task.values())).task
        chosen = {}
        for system in planned:
            candidates = [on_task[run.key] for run in system.candidates]
            chosen[system.name] = system.candidates[choose(on_task[system.anchor.key], candidates, best)]
            _write_chosen(settings.output, system.name, label, chosen[system.name])
        tasks.append(RankedTask(place, label, chosen))
    return tasks


def _write_chosen(output: Path, name: str, task: str, run: SystemRun) -> None:
    (output / "chosen").mkdir(exist_ok=True)
    file = re.sub(r"[^\w.]+", "-", f"{name}-{task}").strip("-")
    write_text(output / "chosen" / f"{file}.yaml", dump_yaml(decoding_settings(run.decoder)))


def _measure(
    settings: LeaderboardSettings, planned: Sequence[PlannedSystem], task: RankedTask, progress: Progress
) -> dict[str, MeasuredSystem]:
    """Every system on the task's test problems."""
    runs = distinct_runs(run for system in planned for run in (system.anchor, task.chosen[system.name]))
    output = settings.output / "test" / re.sub(r"[^\w.]+", "-", task.label)
    rows = _evaluate(settings, list(runs.values()), [task.place], "test", settings.count, output, progress)
    return {
        system.name: MeasuredSystem(rows[system.anchor.key][0], rows[task.chosen[system.name].key][0])
        for system in planned
    }


def _points_table(
    planned: Sequence[PlannedSystem], standings: Sequence[Standing], settings: LeaderboardSettings
) -> PointsTable:
    methods = {}
    for system in planned:
        own = [each for each in standings if each.system == system.name and each.measured.own.tpf]
        methods[system.name] = MethodPoints(
            points={each.task: each.measured.points for each in own},
            tps={each.task: ((each.measured.own.tps, each.measured.own.accuracy),) for each in own},
            note=system.system.note,
        )
    source = (
        f"{settings.count} test problems a task, settings chosen on {settings.validation_count} validation problems"
    )
    return build(PointsTable, {"title": "Measured", "source": source, "methods": methods})
