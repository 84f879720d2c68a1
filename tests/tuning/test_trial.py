"""What a trial is given: settings that are not searched, and problems dealt at random."""

from __future__ import annotations

from typing import Any

import pytest

from d3llm_ray.evaluation.pool import EnginePool, EngineWork
from d3llm_ray.progress import Progress
from d3llm_ray.tuning import search as searching
from d3llm_ray.tuning.objective import SearchObjective
from d3llm_ray.tuning.outcomes import deal
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.tuning.space import SearchSpace


class Held(Exception):
    """The search has said what a trial is given."""


def test_a_trial_is_given_its_work_and_its_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def hold(run: Any, **parameters: Any) -> None:
        given.append(parameters)
        raise Held

    monkeypatch.setattr(searching.tune, "with_parameters", hold)
    space = SearchSpace(decoder="d3llm", parameters={"cache_delay": {"type": "int", "low": 1, "high": 3}})
    objective, pool = SearchObjective("tps", (2.0, 80.0), 3.5), EnginePool(())
    work = EngineWork("arith", "validation", 60, {"decoder": "d3llm", "suffix": "cached"})
    settings = TuneSettings(count=40, seed=5)
    with pytest.raises(Held):
        searching.search(settings, space, [], objective, pool, work, Progress(quiet=True))
    assert given == [{"pool": pool, "objective": objective, "work": work, "shards": deal(40, 4, 5)}]
