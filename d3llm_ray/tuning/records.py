"""What a search leaves behind: its trials and their front as CSV and JSON, pictures, a report, the chosen settings."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from d3llm_ray.decoding import read_decoder
from d3llm_ray.errors import InputError
from d3llm_ray.report import can_plot, machine, versions, write_text
from d3llm_ray.tuning.held_out import HeldOut
from d3llm_ray.tuning.importance import importance, map_axes
from d3llm_ray.tuning.objective import SearchObjective, TuneTrial, best_trial, pareto_front
from d3llm_ray.tuning.space import SearchSpace
from d3llm_ray.tuning.summary import to_markdown

CHOSEN = "settings.yaml"


def write_records(
    directory: Path,
    space: SearchSpace,
    objective: SearchObjective,
    trials: Sequence[TuneTrial],
    held_out: HeldOut | None = None,
) -> Path:
    """Write `trials.csv`, `trials.json`, `pareto.json`, `report.md`, `pareto.png`, for two parameters or more
    `heat_map.png`, and, last of all, `settings.yaml`; returns the latter's path.

    Where `settings.yaml` exists, the search is complete.
    """
    best = best_trial(trials)
    chosen = space.decoding_settings(best.values)
    shares = importance(space, trials)
    map_of = map_axes(space, shares)
    write_text(directory / "trials.csv", _csv(space, trials))
    content = {
        "objective": asdict(objective),
        "best": best.number,
        "settings": chosen,
        "importance": shares,
        "held_out": held_out and held_out.to_dict(),
        "trials": [asdict(trial) for trial in trials],
        "machine": machine(),
        "versions": versions(),
    }
    write_text(directory / "trials.json", json.dumps(content, indent=1) + "\n")
    front = [
        {**asdict(trial), "settings": space.decoding_settings(trial.values)}
        for trial in pareto_front(trials, objective.speed)
    ]
    write_text(directory / "pareto.json", json.dumps({"speed": objective.speed, "front": front}, indent=1) + "\n")
    write_text(directory / "report.md", to_markdown(space, objective, trials, shares, held_out, map_of))
    if can_plot(*(directory / name for name in ("pareto.png", "heat_map.png"))):
        from d3llm_ray.tuning.plots import plot_heat_map, plot_trials

        plot_trials(directory / "pareto.png", space, objective, trials)
        if map_of is not None:
            plot_heat_map(directory / "heat_map.png", space, trials, map_of)
    path = directory / CHOSEN
    write_text(path, yaml.safe_dump(chosen, sort_keys=False))
    return path


def read_unanswered(directory: Path) -> list[str]:
    """The problems that a complete search did not answer, in its trials or held out; `InputError` where its records are
    damaged."""
    file = directory / "trials.json"
    if not file.is_file():
        return []
    read_decoder(directory / CHOSEN)  # which a user may have changed since
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        measured = [*content["trials"], content["held_out"] or {"unanswered": []}]
        return [str(text) for one in measured for text in one["unanswered"]]
    except (ValueError, TypeError, LookupError) as error:
        raise InputError(f"output: {file} is damaged or another version's: {type(error).__name__}: {error}") from error


def _csv(space: SearchSpace, trials: Sequence[TuneTrial]) -> str:
    rows: list[dict[str, Any]] = [{**asdict(trial), **trial.values} for trial in trials]
    figures = [name for name in asdict(trials[0]) if name not in ("number", "values", "unanswered")]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["number", *space.parameters, *figures], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
