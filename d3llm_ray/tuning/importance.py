"""How much each searched setting matters, by PED-ANOVA over the trials (arXiv:2304.10255)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from ray.tune.search.optuna import OptunaSearch

from d3llm_ray.tuning.domains import domains
from d3llm_ray.tuning.objective import TuneTrial
from d3llm_ray.tuning.space import SearchSpace

FEWEST = 8  # trials, below which nothing is said
_MAP_AXES = (("entropy_threshold", "confidence_threshold"), ("refresh_interval", "cache_delay"))


def importance(space: SearchSpace, trials: Sequence[TuneTrial]) -> dict[str, float]:
    """Setting -> its share of what tells the best tenth of the trials from all, highest first; the shares add up to 1.

    Stopped trials count with their expected score. Empty for few trials, or where all score the same.
    """
    if len(trials) < FEWEST or len({trial.score for trial in trials}) < 2:
        return {}
    distributions = OptunaSearch.convert_search_space(domains(space))
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        study.add_trial(optuna.trial.create_trial(params=trial.values, distributions=distributions, value=trial.score))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        shares = optuna.importance.get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return {name: float(share) for name, share in shares.items()}


def map_axes(space: SearchSpace, shares: dict[str, float]) -> tuple[str, str] | None:
    """The two parameters of the heat map: a threshold and a refresh where they are searched, else the most important;
    None where fewer than two are searched."""
    ranked = sorted(space.parameters, key=lambda name: -shares.get(name, 0.0))
    chosen: list[str] = []
    for preferred in _MAP_AXES:
        candidates = [name for name in (*preferred, *ranked) if name in space.parameters and name not in chosen]
        chosen += candidates[:1]
    return (chosen[0], chosen[1]) if len(chosen) == 2 else None
