"""The search on Ray: a known optimum, failures and resumption, and one real search of a small checkpoint."""

from __future__ import annotations

import json
import math

import pytest
import ray
import yaml

from d3llm_ray.config import build
from d3llm_ray.decoding import DiffusionLLM, decoder
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.evaluate import evaluate
from d3llm_ray.evaluation.rows import EvaluationRow
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import load_task
from d3llm_ray.tuning import run as verb
from d3llm_ray.tuning.objective import SearchObjective, best_trial
from d3llm_ray.tuning.search import search
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.tuning.space import SearchSpace

QUIET = Progress(quiet=True)
SPACE = SearchSpace(
    decoder="d3llm",
    parameters={
        "entropy_threshold": {"type": "log_float", "low": 0.05, "high": 3.0},
        "refresh_interval": {"type": "choice", "values": [4, 10000]},
    },
)
ANCHOR = (1.0, 90.0)
SPACE_FILE = "decoder: d3llm\nparameters:\n  entropy_threshold: {type: log_float, low: 0.1, high: 4.0}\n"


def accuracy_of(threshold: float) -> float:
    """Nothing is lost up to a threshold of 0.8 nats; then the answers go wrong quickly."""
    return 90.0 - 40.0 * max(0.0, threshold - 0.8)


def tpf_of(threshold: float, refresh_interval: int) -> float:
    return 2.0 + 4.0 * threshold + (1.0 if refresh_interval == 4 else 0.0)


@ray.remote
class SyntheticEvaluator:
    """Stands for a model whose best settings are known: a threshold just above 0.8, a refresh every 4 forwards."""

    def __init__(self, fails_after: int = 10**9) -> None:
        self.calls, self.fails_after = 0, fails_after

    def measure(self, settings: dict) -> EvaluationRow:
        self.calls += 1
        if self.calls > self.fails_after:
            raise RuntimeError("the evaluator broke")
        threshold, refresh = settings["entropy_threshold"], settings["refresh_interval"]
        return _row(settings, accuracy_of(threshold), tpf_of(threshold, refresh))


def _row(settings: dict, accuracy: float, tpf: float) -> EvaluationRow:
    from d3llm_ray.evaluation.rows import EvaluatedSample, summarise

    right = round(accuracy * 100)
    samples = [
        EvaluatedSample("id", "", None, "1", k < right, round(tpf * 1000), 1000, 1, "stop") for k in range(10_000)
    ]
    labels = {"model": "m", "decoder": "d3llm", "task": "t", "settings": settings, "max_tokens": 64}
    return summarise(samples, 1.0, temperature=0.0, seed=0, warmup=0, max_batch_size=1, **labels)


@pytest.mark.usefixtures("ray_cluster")
def test_the_known_optimum_is_found_and_the_search_repeats_itself(tmp_path):
    runs = []
    for name in ("first", "second"):
        settings = TuneSettings(trials=14, output=tmp_path / name)
        pool = [SyntheticEvaluator.options(num_cpus=0).remote()]
        runs.append(search(settings, SPACE, SearchObjective("aup", ANCHOR, 2.0), pool, QUIET))
    first, second = runs
    assert [trial.values for trial in first] == [trial.values for trial in second]
    assert len(first) == 14
    assert first[0].values == {"entropy_threshold": 0.45, "refresh_interval": 10000}  # the preset's own come first
    assert first[0].accuracy == 90.0 and first[0].tpf == pytest.approx(3.8)
    best = best_trial(first)
    assert best.values["refresh_interval"] == 4
    assert 0.6 < best.values["entropy_threshold"] <= 0.93  # beyond, more than five points are lost
    # independently of the package: anchor (1, 90), W = min(exp(-3 (1 - y/90)), 1)
    area = 90 + (best.tpf - 1) * (90 + best.accuracy * math.exp(-3 * (1 - best.accuracy / 90))) / 2
    assert best.score == pytest.approx(area) and best.score == max(trial.score for trial in first)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_failed_search_says_why_and_goes_on_where_it_stopped(tmp_path):
    settings = TuneSettings(trials=5, output=tmp_path / "search")
    objective = SearchObjective("aup", ANCHOR, 2.0)
    with pytest.raises(RuntimeError, match=r"3 of 5 trials failed(.|\n)*the evaluator broke"):
        search(settings, SPACE, objective, [SyntheticEvaluator.options(num_cpus=0).remote(2)], QUIET)
    pool = [SyntheticEvaluator.options(num_cpus=0).remote(3)]  # would fail if finished trials ran again
    trials = search(settings, SPACE, objective, pool, QUIET)
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    assert trials[0].values == {"entropy_threshold": 0.45, "refresh_interval": 10000}
    for trial in trials:
        assert trial.accuracy == pytest.approx(accuracy_of(trial.values["entropy_threshold"]), abs=0.01)


@pytest.fixture
def settings(tiny_checkpoint, tmp_path) -> TuneSettings:
    space = tmp_path / "space.yaml"
    space.write_text(SPACE_FILE)
    return TuneSettings(
        model=str(tiny_checkpoint),
        space=space,
        metric="tpf",
        max_accuracy_drop=100.0,  # random weights solve nothing
        count=10,
        trials=3,
        max_tokens=32,
        output=tmp_path / "tuned",
    )


@pytest.mark.usefixtures("ray_cluster")
def test_a_real_search_writes_settings_that_reproduce_its_best_trial(settings):
    path = verb.run(settings, QUIET)
    chosen = yaml.safe_load(path.read_text())
    records = json.loads((settings.output / "trials.json").read_text())
    best = max(records["trials"], key=lambda trial: trial["score"])
    default = next(trial for trial in records["trials"] if trial["values"] == {"entropy_threshold": 0.45})
    assert chosen["entropy_threshold"] == best["values"]["entropy_threshold"]
    assert best["tpf"] >= default["tpf"]

    task = load_task("arith")
    preset = decoder(chosen.pop("decoder"), **chosen)
    llm = DiffusionLLM.from_pretrained(settings.model, decoder=preset)
    row = evaluate(llm, task, task.problems("validation", 10), max_tokens=32, progress=QUIET)
    assert (row.tokens, row.forwards, row.accuracy) == (best["tokens"], best["forwards"], best["accuracy"])

    vanilla = DiffusionLLM.from_pretrained(settings.model, decoder="vanilla")
    anchor = evaluate(vanilla, task, task.problems("validation", 10), max_tokens=32, progress=QUIET)
    assert records["objective"]["anchor"] == [anchor.tpf, anchor.accuracy]

    stamp = path.stat().st_mtime_ns
    assert verb.run(settings, QUIET) == path and path.stat().st_mtime_ns == stamp  # complete: nothing is repeated
    with pytest.raises(InputError, match=r"output: .*tune.yaml belongs to another search"):
        verb.run(settings.model_copy(update={"trials": 4}), QUIET)


def test_an_unknown_anchor_model_is_refused(settings):
    with pytest.raises(InputError, match=r"model: unknown .*'gpt-9'"):
        verb.run(settings.model_copy(update={"anchor_model": "gpt-9"}), QUIET)


@pytest.mark.usefixtures("ray_cluster")
def test_evaluators_that_find_no_room_end_in_one_line(settings):
    hungry = settings.model_copy(update={"cpus_per_actor": 1000, "resource_timeout_s": 1.0})
    with pytest.raises(InputError, match=r"actors: 2 of 1000 CPUs .* free in the cluster: [\d.]+ CPUs"):
        verb.run(hungry, QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "no-such-model"}, "no-such-model.*accepted.*tiny-llada"),
        ({"task": "gsm9k"}, "gsm9k.*accepted.*arith"),
        ({"space": "nowhere.yaml"}, "nowhere.yaml"),
        ({"metric": "speed"}, "metric"),
        ({"split": "test"}, "split"),
        ({"actors": 11}, "actors: got 11 for 10 problems"),
        ({"trials": 0}, "trials"),
    ],
)
def test_bad_settings_fail_before_ray_starts(settings, monkeypatch, change, message):
    monkeypatch.setattr(verb, "connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(InputError, match=message):
        verb.run(build(TuneSettings, settings.model_dump() | change), QUIET)


def test_a_space_with_an_unknown_setting_fails_before_ray_starts(settings, monkeypatch):
    monkeypatch.setattr(verb, "connect", lambda: pytest.fail("Ray was started"))
    settings.space.write_text(SPACE_FILE.replace("entropy_threshold", "entropy_treshold"))
    with pytest.raises(InputError, match=r"space.yaml: entropy_treshold.*accepted.*entropy_threshold"):
        verb.run(settings, QUIET)


def test_a_changed_settings_file_is_another_search(tiny_checkpoint, tmp_path, monkeypatch):
    def stop() -> None:
        raise KeyboardInterrupt  # before Ray starts

    monkeypatch.setattr(verb, "connect", stop)
    tuned, space = tmp_path / "tuned.yaml", tmp_path / "space.yaml"
    tuned.write_text("decoder: d3llm\nsuffix: cached\n")
    space.write_text(f"decoder: {tuned}\nparameters: {{entropy_threshold: {{type: float, low: 0.2, high: 0.8}}}}\n")
    settings = TuneSettings(model=str(tiny_checkpoint), space=space, count=4, output=tmp_path / "search")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            verb.run(settings, QUIET)
    tuned.write_text("decoder: d3llm\nsuffix: none\n")
    with pytest.raises(InputError, match="decoder.json belongs to another search"):
        verb.run(settings, QUIET)
