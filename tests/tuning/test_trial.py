"""What a trial is given and what it adds up: settings that are not searched, and the slowest evaluator's seconds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow, summarise
from d3llm_ray.progress import Progress
from d3llm_ray.tuning import search as searching
from d3llm_ray.tuning import trial
from d3llm_ray.tuning.objective import SearchObjective
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.tuning.space import SearchSpace


def row(seconds: float) -> EvaluationRow:
    """Two problems, one of them right, 6 tokens each."""
    samples = [EvaluatedSample(str(n), "", "1", "1", n == 0, 6, 3, 4, "stop") for n in range(2)]
    labels: dict[str, Any] = {name: name for name in ("model", "decoder", "task")}
    labels |= {"settings": {}, "max_tokens": 8, "temperature": 0.0, "seed": 0, "warmup": 0, "max_batch_size": 1}
    return summarise(samples, seconds, **labels)


def test_evaluators_work_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial.ray, "get", lambda values: values)
    rows = [row(2.0), row(6.0), row(1.0)]
    pool: Any = [SimpleNamespace(measure=SimpleNamespace(remote=lambda _, one=one: one)) for one in rows]
    found = trial.measure(pool, {"decoder": "d3llm"})
    assert (found.seconds, found.problems, found.tokens, found.tps) == (6.0, 6, 36, 6.0)


class Held(Exception):
    """The search has said what a trial is given."""


def test_a_trial_is_given_the_settings_that_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def hold(run: Any, **parameters: Any) -> None:
        given.append(parameters)
        raise Held

    monkeypatch.setattr(searching.tune, "with_parameters", hold)
    space = SearchSpace(
        decoder="d3llm",
        parameters={"cache_delay": {"type": "int", "low": 1, "high": 3}},
        decoder_settings={"suffix": "cached", "refresh_interval": 4},
    )
    objective, pool = SearchObjective("tps", (2.0, 80.0), 3.5), ["pool"]
    with pytest.raises(Held):
        searching.search(TuneSettings(), space, objective, pool, Progress(quiet=True))  # type: ignore[arg-type]
    base = {"decoder": "d3llm", "suffix": "cached", "refresh_interval": 4}
    assert given == [{"pool": pool, "objective": objective, "base": base}]
