"""One trial: a thin client of the evaluators. It imports no model code, so that its process starts quickly."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle

from d3llm_ray.evaluation.rows import EvaluationRow, summarise, unanswered
from d3llm_ray.tuning.objective import SearchObjective

Pool = Sequence[ActorHandle[Any]]
FIGURES = ("accuracy", "tpf", "tps", "tokens", "forwards", "seconds", "errors")
_LABELS = (
    "model",
    "decoder",
    "task",
    "settings",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "warmup",
    "max_batch_size",
)


def measure(pool: Pool, decoding_settings: dict[str, Any]) -> EvaluationRow:
    """One row over the problems of all evaluators, in the task's order; `seconds` is the slowest evaluator's, as they
    work at the same time."""
    rows: list[EvaluationRow] = ray.get([actor.measure.remote(decoding_settings) for actor in pool])
    dealt = chain.from_iterable(zip_longest(*(row.samples for row in rows)))  # as `Evaluator` takes its problems
    samples = [sample for sample in dealt if sample is not None]
    return summarise(samples, max(row.seconds for row in rows), **{name: getattr(rows[0], name) for name in _LABELS})


def run_trial(config: dict[str, Any], pool: Pool, objective: SearchObjective, base: dict[str, Any]) -> None:
    """Have the pool measure the suggested values on top of the `base` decoding settings, and report the figures."""
    row = measure(pool, {**base, **config})
    score = objective.score(row.tpf, row.accuracy, row.tps)
    figures = {name: getattr(row, name) for name in FIGURES}
    tune.report({"score": score, "finished": time.time(), "unanswered": json.dumps(unanswered(row.samples)), **figures})
