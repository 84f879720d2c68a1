"""What a search leaves behind: its trials as CSV and JSON, its plot, and the settings it chose."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from d3llm_ray.decoding import read_decoder
from d3llm_ray.errors import InputError
from d3llm_ray.report import machine, save_figure, versions, write_text
from d3llm_ray.tuning.objective import SearchObjective, TuneTrial, best_trial, pareto_front
from d3llm_ray.tuning.space import SearchSpace

CHOSEN = "settings.yaml"


def write_records(directory: Path, space: SearchSpace, objective: SearchObjective, trials: Sequence[TuneTrial]) -> Path:
    """Write `trials.csv`, `trials.json`, `pareto.png` and, last of all, `settings.yaml`; returns the latter's path.

    Where `settings.yaml` exists, the search is complete.
    """
    best = best_trial(trials)
    chosen = space.decoding_settings(best.values)
    write_text(directory / "trials.csv", _csv(space, trials))
    content = {
        "objective": asdict(objective),
        "best": best.number,
        "settings": chosen,
        "trials": [asdict(trial) for trial in trials],
        "machine": machine(),
        "versions": versions(),
    }
    write_text(directory / "trials.json", json.dumps(content, indent=1) + "\n")
    plot_trials(directory / "pareto.png", space, objective, trials)
    path = directory / CHOSEN
    write_text(path, yaml.safe_dump(chosen, sort_keys=False))
    return path


def read_unanswered(directory: Path) -> list[str]:
    """The problems that trials of a complete search did not answer; `InputError` where its records are damaged."""
    file = directory / "trials.json"
    if not file.is_file():
        return []
    read_decoder(directory / CHOSEN)  # which a user may have changed since
    try:
        trials = json.loads(file.read_text(encoding="utf-8"))["trials"]
        return [str(text) for trial in trials for text in trial["unanswered"]]
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


def plot_trials(path: Path, space: SearchSpace, objective: SearchObjective, trials: Sequence[TuneTrial]) -> None:
    """Accuracy (percent) over tokens per forward of every trial, with the Pareto front, the anchor and the choice."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    best, front = best_trial(trials), pareto_front(trials)
    axes.scatter([trial.tpf for trial in trials], [trial.accuracy for trial in trials], color="C0", label="trials")
    axes.step(
        [t.tpf for t in front], [t.accuracy for t in front], where="pre", color="C0", alpha=0.5, label="Pareto front"
    )
    axes.scatter(*objective.anchor, color="C7", marker="s", label="anchor (vanilla)")
    default = next((trial for trial in trials if trial.values == space.default_point()), None)
    if default is not None:
        axes.scatter(default.tpf, default.accuracy, color="C1", marker="D", label=f"{space.decoder}, its own settings")
    axes.scatter(best.tpf, best.accuracy, s=160, facecolors="none", edgecolors="C3", linewidths=2, label="chosen")
    axes.set(title=f"{space.decoder}: {len(trials)} trials", xlabel="tokens per forward", ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path)
