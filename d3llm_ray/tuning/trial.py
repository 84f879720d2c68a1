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
from d3llm_ray.tuning.outcomes import outcomes_of, write_outcomes

Pool = Sequence[ActorHandle[Any]]
FIGURES = ("accuracy", "tpf", "tps", "tokens", "forwards", "seconds", "errors", "problems")
_LABELS = ("model", "decoder", "task", "settings", "max_tokens", "temperature", "seed", "warmup", "max_batch_size")


def measure(pool: Pool, decoding_settings: dict[str, Any], numbers: Sequence[int], first: bool = True) -> EvaluationRow:
    """One row over the problems of these numbers, in this order, shared out over all evaluators; `seconds` is the
    slowest evaluator's, as they work at the same time. `first`: nothing was measured with these settings before."""
    parts = [(actor, list(numbers[part :: len(pool)])) for part, actor in enumerate(pool)]
    asked = [actor.measure.remote(decoding_settings, part, first) for actor, part in parts if part]
    rows: list[EvaluationRow] = ray.get(asked)
    dealt = chain.from_iterable(zip_longest(*(row.samples for row in rows)))
    samples = [sample for sample in dealt if sample is not None]
    return _row(samples, max(row.seconds for row in rows), rows[0])


def together(rows: Sequence[EvaluationRow]) -> EvaluationRow:
    """One row of several that were measured one after the other."""
    return _row([sample for row in rows for sample in row.samples], sum(row.seconds for row in rows), rows[0])


def _row(samples: Sequence[Any], seconds: float, labels: EvaluationRow) -> EvaluationRow:
    return summarise(samples, seconds, **{name: getattr(labels, name) for name in _LABELS})


def run_trial(
    config: dict[str, Any],
    pool: Pool,
    objective: SearchObjective,
    base: dict[str, Any],
    shards: Sequence[Sequence[int]],
) -> None:
    """Have the pool measure the suggested values on top of the `base` decoding settings, and report the figures after
    every shard: of all problems so far."""
    rows: list[EvaluationRow] = []
    for shard in shards:
        rows.append(measure(pool, {**base, **config}, shard, first=not rows))
        row = together(rows)
        numbers = list(chain.from_iterable(shards[: len(rows)]))
        tune.report(
            {
                "score": objective.score(row.tpf, row.accuracy, row.tps),
                "aup": objective.aup(row.tpf, row.accuracy),
                "shards_left": len(shards) - len(rows),
                "finished": time.time(),
                "unanswered": json.dumps(unanswered(row.samples, [number + 1 for number in numbers])),
                "outcomes": write_outcomes(outcomes_of(row.samples)),
                **{name: getattr(row, name) for name in FIGURES},
            }
        )
