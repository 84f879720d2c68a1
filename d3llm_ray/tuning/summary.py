"""A search for people: `report.md`."""

from __future__ import annotations

from collections.abc import Sequence

from d3llm_ray.report import table
from d3llm_ray.tuning.held_out import Figure, HeldOut
from d3llm_ray.tuning.objective import SearchObjective, TuneTrial, best_trial, finished, pareto_front
from d3llm_ray.tuning.space import SearchSpace


def to_markdown(
    space: SearchSpace,
    objective: SearchObjective,
    trials: Sequence[TuneTrial],
    importance: dict[str, float],
    held_out: HeldOut | None,
    map_of: tuple[str, str] | None,
) -> str:
    """The chosen settings, whether they hold on held-out problems, the front and what matters; sections, in this
    order."""
    best, front = best_trial(trials), pareto_front(trials, objective.speed)
    own = next((trial for trial in finished(trials) if trial.values == space.default_point()), None)
    stopped = len(trials) - len(finished(trials))
    names = list(space.parameters)
    header = [*names, "accuracy", "TPF", "tokens/s", "AUP", "score"]
    lines = [
        f"# Search of decoding settings: {space.decoder}",
        "",
        f"{len(trials)} trials, {stopped} of them stopped early; metric {objective.metric}; anchor (vanilla): TPF "
        f"{objective.anchor[0]:.4g}, accuracy {objective.anchor[1]:.4g} %. A higher score is better; AUP is that of "
        "the anchor and the settings, also where another metric is searched.",
        "",
        "## Chosen, on the problems of the search",
        "",
        table(
            ["", *header],
            [[label, *_cells(trial, names)] for label, trial in (("chosen", best), ("own", own)) if trial is not None],
            left=1,
        ),
        "The chosen settings are the best of many on these problems, so that their figures here are too good.",
        "",
        "## Held-out problems",
        "",
        *held_out_lines(held_out, best),
        f"## Pareto front of accuracy and {'TPF' if objective.speed == 'tpf' else 'tokens/s'}",
        "",
        table(["trial", *header], [[str(trial.number), *_cells(trial, names)] for trial in front], left=1),
        "## Importance",
        "",
        *(
            [table(["setting", "share"], [[name, f"{share:.2f}"] for name, share in importance.items()], left=1)]
            if importance
            else ["Too few trials, or all with one score, to say what matters.", ""]
        ),
    ]
    if map_of:
        lines += [f"`heat_map.png` shows {map_of[0]} x {map_of[1]}, interpolated from the trials (dots).", ""]
    return "\n".join(lines)


def _cells(trial: TuneTrial, names: list[str]) -> list[str]:
    values = [trial.values[name] for name in names]
    figures = [trial.accuracy, trial.tpf, trial.tps, trial.aup, trial.score]
    return [*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values), *map(_short, figures)]


def _short(value: float) -> str:
    return f"{value:.4g}"


def held_out_lines(held_out: HeldOut | None, best: TuneTrial) -> list[str]:
    if held_out is None:
        return ["None were kept apart (`held_out`): whether the choice holds elsewhere is not known.", ""]
    names = list(held_out.rows[0].figures)
    rows = [[row.name, *(_interval(row.figures[name]) for name in names), _short(row.tps)] for row in held_out.rows]
    differences = ["chosen - own", *(_interval(held_out.differences[name]) for name in names), ""]
    searched = ["chosen, as searched", *(_short(getattr(best, name)) for name in names), _short(best.tps)]
    return [
        f"**{held_out.verdict}**",
        "",
        f"{held_out.problems} problems that the search has not seen, with 95 % intervals (accuracy: Wilson; the others "
        "and the differences: a bootstrap over problems, the same ones for all decoders).",
        "",
        table(["", *names, "tokens/s"], [*rows, differences, searched], left=1),
        f"Problems that only the chosen settings solve: {held_out.gained}; that only the own ones solve: "
        f"{held_out.lost} (exact McNemar test, two-sided: p = {held_out.p_value:.2g}).",
        "",
    ]


def _interval(figure: Figure) -> str:
    return f"{figure.value:.4g} ({figure.low:.4g} to {figure.high:.4g})"
