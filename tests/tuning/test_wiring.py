"""Every setting of `tune` arrives: in the evaluators, in the search, in the score; and what is found comes back."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray import tune

from d3llm_ray.config import build
from d3llm_ray.decoding import decoding_settings
from d3llm_ray.decoding.presets import plain_decoder
from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow, summarise
from d3llm_ray.models import read_configs
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import load_task
from d3llm_ray.tuning import evaluators, trial
from d3llm_ray.tuning import run as verb
from d3llm_ray.tuning import search as searching
from d3llm_ray.tuning.objective import SearchObjective
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.tuning.space import Range, SearchSpace, ValueChoice, read_space

QUIET = Progress(quiet=True)
SPACE = "decoder: d3llm\nparameters: {cache_delay: {type: int, low: 1, high: 3}}\ndecoder_settings: {suffix: cached}\n"
GIVEN: dict[str, Any] = {
    "max_tokens": 24, "temperature": 0.3, "seed": 5, "max_batch_size": 7, "dtype": "bfloat16", "device": "cuda:1",
    "model": "tiny-llada", "task": "arith-long", "split": "train", "count": 9, "trials": 12, "metric": "tps",
    "max_accuracy_drop": 3.5, "anchor": None, "anchor_model": "tiny-ar", "actors": 3, "cpus_per_actor": 4,
    "gpus_per_actor": 0.5, "concurrent_trials": 2, "resource_timeout_s": 17.0,
}  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> TuneSettings:
    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    given = {**GIVEN, "space": space, "output": tmp_path / "out"}
    assert given.keys() == TuneSettings.model_fields.keys()
    return build(TuneSettings, given)


def row(accuracy_of: int = 4, seconds: float = 2.0, forwards: int = 3, **labels: Any) -> EvaluationRow:
    """Of 5 problems, 6 tokens each."""
    values = {"model": "m", "decoder": "d", "task": "t", "settings": {}, "max_tokens": 24, "temperature": 0.3}
    values |= {"seed": 5, "warmup": 1, "max_batch_size": 7, **labels}
    samples = [EvaluatedSample(str(n), "", "1", "1", n < accuracy_of, 6, forwards, 4, "stop") for n in range(5)]
    return summarise(samples, seconds, **values)


# --- the verb


def test_every_setting_is_handed_on_and_the_anchor_survives_a_restart(
    settings: TuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The anchor model is measured once, by its own plain decoder, in evaluators of its own."""
    pools: list[TuneSettings] = []
    measured: list[Any] = []
    searched: list[tuple[Any, ...]] = []
    written: list[tuple[Any, ...]] = []

    def pool(pool_settings: TuneSettings) -> Any:
        pools.append(pool_settings)
        return contextlib.nullcontext([pool_settings.model])

    def measure(actors: Any, chosen: dict[str, Any]) -> EvaluationRow:
        measured.append((actors, chosen))
        return row()

    monkeypatch.setattr(verb, "connect", lambda: None)
    monkeypatch.setattr(verb, "evaluator_pool", pool)
    monkeypatch.setattr(verb, "measure", measure)
    monkeypatch.setattr(verb, "search", lambda *values: searched.append(values) or ["trials"])
    monkeypatch.setattr(verb, "write_records", lambda *values: written.append(values))
    for _ in range(2):  # the second start finds the anchor of the first
        verb.run(settings, QUIET)
    plain = decoding_settings(plain_decoder(read_configs("tiny-ar")[1]))
    assert measured == [(["tiny-ar"], plain)]
    alike = settings.model_copy(update={"model": "tiny-ar"})
    assert pools == [alike, settings, settings]
    space, objective = read_space(settings.space), SearchObjective("tps", (2.0, 80.0), 3.5)
    assert searched == [(settings, space, objective, ["tiny-llada"], QUIET)] * 2
    assert written == [(settings.output, space, objective, ["trials"])] * 2
    given = settings.model_copy(update={"anchor": (1.5, 70.0), "output": settings.output / "other"})
    verb.run(given, QUIET)
    assert searched[-1][2] == SearchObjective("tps", (1.5, 70.0), 3.5) and len(measured) == 1


# --- evaluators


def test_an_evaluator_measures_its_share_with_the_settings(
    settings: TuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = evaluators.Evaluator.__ray_metadata__.modified_class
    loaded: list[Any] = []
    asked: list[Any] = []
    threads: list[int] = []
    monkeypatch.setattr(
        evaluators.DiffusionLLM, "from_pretrained", lambda *names, **options: loaded.append((names, options)) or "llm"
    )
    monkeypatch.setattr(evaluators, "evaluate", lambda *values, **options: asked.append((values, options)))
    monkeypatch.setattr(evaluators.torch, "set_num_threads", threads.append)
    made = evaluator(settings, 1)
    assert threads == []  # those of a GPU's host are nobody's share
    made.measure({"decoder": "d3llm", "cache_delay": 2})
    assert loaded == [(("tiny-llada",), {"dtype": "bfloat16", "device": "cuda:1", "max_batch_size": 7})]
    ((llm, task, problems, max_tokens, temperature, seed, _), options) = asked[0]
    assert (llm, task.name, max_tokens, temperature, seed) == ("llm", "arith-long", 24, 0.3, 5)
    assert problems == load_task("arith-long").problems("train", 9)[1::3]
    assert options == {"warmup": 1, "decoder": "d3llm", "cache_delay": 2}
    evaluator(settings.model_copy(update={"metric": "aup", "device": "cpu"}), 0).measure({})
    assert asked[1][1] == {"warmup": 0} and threads == [4]


def test_the_pool_asks_for_its_resources_and_waits_its_time(
    settings: TuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    waited: list[Any] = []
    killed: list[Any] = []

    def options(**resources: Any) -> Any:
        def remote(given: TuneSettings, part: int) -> Any:
            asked.append((resources, given, part))
            return SimpleNamespace(ready=SimpleNamespace(remote=lambda: part))

        return SimpleNamespace(remote=remote)

    monkeypatch.setattr(evaluators, "Evaluator", SimpleNamespace(options=options))
    monkeypatch.setattr(evaluators.ray, "get", lambda ready, timeout: waited.append((ready, timeout)))
    monkeypatch.setattr(evaluators.ray, "kill", killed.append)
    with evaluators.evaluator_pool(settings) as pool:
        assert len(pool) == 3 and not killed
    assert asked == [({"num_cpus": 4, "num_gpus": 0.5}, settings, part) for part in range(3)]
    assert waited == [([0, 1, 2], 17.0)] and killed == pool


# --- trials


def test_a_measurement_is_the_rows_of_all_evaluators_and_the_slowest_ones_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = {
        "model": "m2", "decoder": "d2", "task": "t2", "settings": {"a": 1}, "max_tokens": 25, "temperature": 0.5,
        "seed": 6, "warmup": 0, "max_batch_size": 8,
    }  # fmt: skip
    rows = [row(4, 2.0, **labels), row(1, 6.0, forwards=2, **labels)]
    asked: list[Any] = []
    monkeypatch.setattr(trial.ray, "get", lambda values: values)
    pool = [SimpleNamespace(measure=SimpleNamespace(remote=lambda s, n=n: asked.append(s) or rows[n])) for n in (0, 1)]
    found = trial.measure(pool, {"decoder": "d3llm"})
    assert asked == [{"decoder": "d3llm"}] * 2
    assert (found.problems, found.correct, found.tokens, found.forwards, found.seconds) == (10, 5, 60, 25, 6.0)
    assert {name: getattr(found, name) for name in labels} == labels


def test_a_trial_puts_what_is_suggested_over_what_is_given_and_reports_every_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(trial, "measure", lambda pool, chosen: asked.append((pool, chosen)) or row())
    monkeypatch.setattr(trial.tune, "report", reported.append)
    objective = SearchObjective("tps", (2.0, 80.0), 3.5)
    trial.run_trial({"cache_delay": 2}, ["pool"], objective, {"decoder": "d3llm", "cache_delay": 1, "suffix": "none"})
    assert asked == [(["pool"], {"decoder": "d3llm", "cache_delay": 2, "suffix": "none"})]
    (found,) = reported
    assert found.pop("finished") > 0
    assert found == {
        "score": 15.0, "accuracy": 80.0, "tpf": 2.0, "tps": 15.0, "tokens": 30, "forwards": 15, "seconds": 2.0,
    }  # fmt: skip
    told = searching._trial(3, {"cache_delay": 2}, {**found, "other": 1})
    assert (told.number, told.values, told.score) == (3, {"cache_delay": 2}, 15.0)
    assert {name: getattr(told, name) for name in trial.FIGURES} == {name: found[name] for name in trial.FIGURES}


# --- the search


class Held(Exception):
    """The search has been set up."""


def test_every_setting_of_the_search_reaches_ray_tune(settings: TuneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    samplers: list[dict[str, Any]] = []
    algorithms: list[dict[str, Any]] = []
    parameters: list[dict[str, Any]] = []

    class Tuner:
        def __init__(self, trainable: Any, **options: Any) -> None:
            made.update(options)
            raise Held

        @staticmethod
        def can_restore(folder: str) -> bool:
            return False

    monkeypatch.setattr(searching.tune, "Tuner", Tuner)
    monkeypatch.setattr(
        searching.tune, "with_parameters", lambda run, **given: parameters.append({"run": run, **given})
    )
    monkeypatch.setattr(searching.tune, "with_resources", lambda trainable, resources: trainable)
    monkeypatch.setattr(
        searching.optuna.samplers, "TPESampler", lambda **options: samplers.append(options) or "sampler"
    )
    monkeypatch.setattr(searching, "OptunaSearch", lambda **options: algorithms.append(options) or "algorithm")
    space, objective = read_space(settings.space), SearchObjective("tps", (2.0, 80.0), 3.5)
    with pytest.raises(Held):
        searching.search(settings, space, objective, ["pool"], QUIET)
    base = {"decoder": "d3llm", "suffix": "cached"}
    assert parameters == [{"run": trial.run_trial, "pool": ["pool"], "objective": objective, "base": base}]
    assert samplers == [{"seed": 5, "n_startup_trials": 4}]  # a third of the trials is drawn at random
    assert algorithms == [
        {"metric": "score", "mode": "max", "sampler": "sampler", "points_to_evaluate": [{"cache_delay": 1}]}
    ]
    config = made["tune_config"]
    assert (config.num_samples, config.max_concurrent_trials, config.search_alg) == (12, 2, "algorithm")
    assert (config.metric, config.mode) == ("score", "max")
    where = made["run_config"]
    assert Path(where.storage_path) / where.name == settings.output.resolve() / "search"
    assert made["param_space"].keys() == {"cache_delay"}


def test_a_range_holds_both_its_ends() -> None:
    whole = searching._domain(Range(type="int", low=1, high=3))
    assert {whole.sample() for _ in range(200)} == {1, 2, 3}
    for kind, sampler in (("float", "_Uniform"), ("log_float", "_LogUniform")):
        domain = searching._domain(Range(type=kind, low=0.1, high=0.4))
        assert (domain.lower, domain.upper) == (0.1, 0.4) and type(domain.get_sampler()).__name__ == sampler
    assert searching._domain(ValueChoice(type="choice", values=(4, None))).categories == [4, None]
    assert isinstance(whole, tune.search.sample.Integer)


def test_a_space_hands_on_what_its_file_says(tmp_path: Path) -> None:
    """A settings file under the space's own settings, under the values that are tried."""
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"decoder": "d3llm", "suffix": "none", "cache_delay": 4, "block_size": 8}))
    values = {"decoder": str(file), "parameters": {"refresh_interval": {"type": "choice", "values": [4]}}}
    space = SearchSpace(**values, decoder_settings={"cache_delay": 3})
    assert space.base().settings()["cache_delay"] == 3 and space.base().settings()["suffix"] == "none"
    expected = {"decoder": "d3llm", "suffix": "none", "cache_delay": 3, "block_size": 8, "refresh_interval": 4}
    assert space.decoding_settings({"refresh_interval": 4}) == expected
