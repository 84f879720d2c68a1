"""One trial: a thin client of the evaluators. It imports no model code, so that its process starts quickly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle

from d3llm_ray.evaluation.rows import EvaluationRow, summarise
from d3llm_ray.tuning.objective import SearchObjective

Pool = Sequence[ActorHandle[Any]]
FIGURES = ("accuracy", "tpf", "tps", "tokens", "forwards", "seconds")
_LABELS = ("model", "decoder", "task", "settings", "max_tokens", "temperature", "seed", "warmup", "max_batch_size")


def measure(pool: Pool, decoding_settings: dict[str, Any]) -> EvaluationRow:
    """One row over the problems of all evaluators; `seconds` is the slowest one's, as they work at the same time."""
    rows: list[EvaluationRow] = ray.get([actor.measure.remote(decoding_settings) for actor in pool])
    samples = [sample for row in rows for sample in row.samples]
    return summarise(samples, max(row.seconds for row in rows), **{name: getattr(rows[0], name) for name in _LABELS})


def run_trial(config: dict[str, Any], pool: Pool, objective: SearchObjective, base: dict[str, Any]) -> None:
    """Have the pool measure the suggested values on top of the `base` decoding settings, and report the figures."""
    row = measure(pool, {**base, **config})
    score = objective.score(row.tpf, row.accuracy, row.tps)
    tune.report({"score": score, "finished": time.time(), **{name: getattr(row, name) for name in FIGURES}})
