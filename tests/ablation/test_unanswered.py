"""A problem without an answer costs its own answer in an ablation too."""

from __future__ import annotations

import json
from typing import Any

import pytest

from d3llm_ray.ablation import run as verb
from d3llm_ray.ablation.plan import AblationTrial
from d3llm_ray.ablation.settings import AblateSettings
from d3llm_ray.ablation.trial import write_record
from d3llm_ray.decoding import decoding_settings
from d3llm_ray.errors import IncompleteError
from d3llm_ray.evaluation.rows import EvaluatedSample, summarise
from d3llm_ray.progress import Progress


def pretend(trial: AblationTrial, settings: AblateSettings) -> None:
    """Stands for a student; that of seed 1 has no answer to the second of its two problems."""
    error = "not finite" if (trial.variant, trial.seed) == ("recipe", 1) else None
    rows = []
    for chosen in trial.decoders:
        samples = [
            EvaluatedSample("a", "", "1", "1", True, 20, 10, 1, "stop"),
            EvaluatedSample("b", "", None, "1", error is None, 20, 10, 1, "stop", "q2", error),
        ]
        labels = {"model": "m", "decoder": chosen.name, "task": "arith", "settings": decoding_settings(chosen)}
        labels |= {"max_tokens": 16, "temperature": 0.0, "seed": 0, "warmup": 0, "max_batch_size": 1}
        rows.append(summarise(samples, 1.0, **labels))
    write_record(settings, trial, {"distill": 1.0, "evaluate": 1.0}, rows)


def test_a_problem_without_an_answer_is_counted_and_named(make_settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_missing(settings: Any, trials: Any, measure: Any, _progress: Any) -> dict[str, str]:
        for trial in trials:
            measure(trial, settings)
        return {}

    monkeypatch.setattr(verb, "_run_missing", run_missing)
    monkeypatch.setattr(verb, "can_plot", lambda *_: False)
    settings = make_settings(variants=["order-random"])
    with pytest.raises(IncompleteError, match=r"answers are missing: 1, .*: recipe-seed1, problem 2 \('q2'\): not fin"):
        verb.run(settings, Progress(quiet=True), pretend)
    report = json.loads((settings.output / "report.json").read_text())
    assert sorted((row["errors"], row["accuracy"]) for row in report["rows"]) == [(0, 100.0)] * 6 + [(1, 50.0)] * 2
    assert "2 problems of all rows together have no answer" in (settings.output / "report.md").read_text()
