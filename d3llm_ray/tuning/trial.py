"""One trial: a thin client of the engines. It imports no model code, so that its process starts quickly."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from ray import tune

from d3llm_ray.evaluation.pool import EnginePool, EngineWork, together
from d3llm_ray.evaluation.rows import EvaluationRow
from d3llm_ray.tuning.objective import SearchObjective
from d3llm_ray.tuning.outcomes import outcomes_of, unanswered_at, write_outcomes

FIGURES = ("accuracy", "tpf", "tps", "tokens", "forwards", "seconds", "errors", "problems")


def run_trial(
    config: dict[str, Any],
    pool: EnginePool,
    work: EngineWork,
    objective: SearchObjective,
    shards: Sequence[Sequence[int]],
) -> None:
    """Have the pool measure the suggested values on top of the decoding settings of `work`, and report the figures
    after every shard: of all problems so far."""
    work = replace(work, decoding_settings={**work.decoding_settings, **config})
    rows: list[EvaluationRow] = []
    for found in pool.measure_shards(work, shards):
        rows.append(found)
        row = together(work, rows, sum(one.seconds for one in rows))
        numbers = list(chain.from_iterable(shards[: len(rows)]))
        tune.report(
            {
                "score": objective.score(row.tpf, row.accuracy, row.tps),
                "aup": objective.aup(row.tpf, row.accuracy),
                "shards_left": len(shards) - len(rows),
                "finished": time.time(),
                "unanswered": json.dumps(unanswered_at(row.samples, numbers)),
                "outcomes": write_outcomes(outcomes_of(row.samples)),
                **{name: getattr(row, name) for name in FIGURES},
            }
        )
