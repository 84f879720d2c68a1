"""The chosen settings and the decoder's own, measured again on problems that the search has never seen."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from d3llm_ray.evaluation.comparisons import mcnemar, paired_counts
from d3llm_ray.evaluation.rows import wilson_interval
from d3llm_ray.tuning.objective import SearchObjective
from d3llm_ray.tuning.outcomes import Outcomes, accuracy_of, tpf_of

RESAMPLES = 2000

_Values = dict[str, npt.NDArray[np.float64]]  # a figure -> its value on all problems, then on each resample


@dataclass(frozen=True)
class Figure:
    """A figure of all problems with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class HeldOutRun:
    """What was measured of one decoder: its outcomes, a problem each, and tokens per second."""

    name: str
    settings: dict[str, Any]
    outcomes: Outcomes
    tps: float
    unanswered: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeldOutRow:
    """One decoder: accuracy in percent with Wilson's interval, TPF, AUP and the objective's score with those of a
    bootstrap over problems. AUP is left out where it is not defined, the score where it is TPS, which has none."""

    name: str
    settings: dict[str, Any]
    tps: float
    figures: dict[str, Figure]


@dataclass(frozen=True)
class HeldOut:
    """The comparison of the chosen settings (first row) with the decoder's own (second), problem by problem.

    `differences` are chosen minus own, with 95 % intervals of a bootstrap that draws the same problems for both and for
    the anchor. `gained` and `lost`: how many problems only the one, or only the other, has right, with the `p_value` of
    McNemar's exact test that neither is more accurate.
    """

    metric: str
    problems: int
    rows: tuple[HeldOutRow, ...]
    differences: dict[str, Figure]
    gained: int
    lost: int
    p_value: float
    unanswered: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        """One sentence: whether the chosen settings beat the decoder's own here."""
        chosen, own = self.rows[:2]
        if chosen.settings == own.settings:
            return "The search chose the decoder's own settings: it found nothing that beats them."
        if "score" not in self.differences:
            relation = "beat" if chosen.tps > own.tps else "do NOT beat"
            figures = f"{chosen.tps:.4g} against {own.tps:.4g} tokens/s, one measurement each"
            return f"The chosen settings {relation} the decoder's own on held-out problems ({figures})."
        found = self.differences["score"]
        figures = f"{self.metric} {found.value:+.4g}, 95 % interval {found.low:+.4g} to {found.high:+.4g}"
        if found.value <= 0:
            return f"The chosen settings do NOT beat the decoder's own on held-out problems ({figures})."
        if found.low <= 0:
            return f"The chosen settings are ahead on held-out problems, but within chance ({figures})."
        return f"The chosen settings beat the decoder's own on held-out problems ({figures})."


def compare(
    chosen: HeldOutRun, own: HeldOutRun, anchor: HeldOutRun | None, objective: SearchObjective, seed: int
) -> HeldOut:
    """Compare two decoders on the same problems. `anchor` None: that of `objective` holds, as it was given."""
    count = len(own.outcomes)
    drawn = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    draws = np.concatenate([np.arange(count)[None], drawn])
    anchors = [objective.anchor] * len(draws)
    if anchor is not None:
        found = [(tpf_of(anchor.outcomes[draw]), accuracy_of(anchor.outcomes[draw])) for draw in draws]
        anchors = [point if min(point) > 0 else objective.anchor for point in found]  # that of a search ranks
    runs = [chosen, own, *([anchor] if anchor else [])]
    values = [_values(run, draws, anchors, objective) for run in runs]
    _, gained, lost, _ = paired_counts(*((run.outcomes[:, 0] == 1).tolist() for run in (chosen, own)))
    return HeldOut(
        metric=objective.metric,
        problems=count,
        rows=tuple(
            HeldOutRow(run.name, run.settings, run.tps, _row(run, of)) for run, of in zip(runs, values, strict=True)
        ),
        differences={name: _figure(values[0][name] - values[1][name]) for name in values[0]},
        gained=gained,
        lost=lost,
        p_value=mcnemar(gained, lost),
        unanswered=tuple(dict.fromkeys([*chosen.unanswered, *own.unanswered])),
    )


def _values(
    run: HeldOutRun, draws: npt.NDArray[np.int64], anchors: list[tuple[float, float]], objective: SearchObjective
) -> _Values:
    points = [(tpf_of(run.outcomes[draw]), accuracy_of(run.outcomes[draw])) for draw in draws]
    values = {"accuracy": [accuracy for _, accuracy in points], "tpf": [tpf for tpf, _ in points]}
    scorers = [replace(objective, anchor=anchor) for anchor in anchors]
    if objective.ranks:
        values["aup"] = [scorer.aup(*point) for scorer, point in zip(scorers, points, strict=True)]
    if objective.speed == "tpf":
        values["score"] = [scorer.score(*point, 0.0) for scorer, point in zip(scorers, points, strict=True)]
    return {name: np.array(found) for name, found in values.items()}


def _row(run: HeldOutRun, values: _Values) -> dict[str, Figure]:
    right, count = int(run.outcomes[:, 0].sum()), len(run.outcomes)
    low, high = wilson_interval(right, count)
    figures = {name: _figure(found) for name, found in values.items()}
    return figures | {"accuracy": Figure(100 * right / count, 100 * low, 100 * high)}


def _figure(values: npt.NDArray[np.float64]) -> Figure:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Figure(float(values[0]), float(low), float(high))
