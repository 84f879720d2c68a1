"""The search on Ray: a known optimum, failures and resumption, and one real search of a small checkpoint."""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml
from tensorboardX.proto import event_pb2

from d3llm_ray.config import build
from d3llm_ray.decoding import DiffusionLLM, decoder
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.evaluate import evaluate
from d3llm_ray.evaluation.pool import EnginePool, EngineWork
from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow, summarise
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import load_task
from d3llm_ray.tuning import run as verb
from d3llm_ray.tuning.objective import SearchObjective, TuneTrial, best_trial, pareto_front
from d3llm_ray.tuning.published import published_settings
from d3llm_ray.tuning.search import search
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.tuning.space import SearchSpace
from tests.wiring import Notes

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


PROBLEMS = 400


@ray.remote(num_cpus=0)
class SyntheticEngine:
    """Stands for a model whose best settings are known: a threshold just above 0.8, a refresh every 4 forwards.

    Problem k is solved where k is below accuracy in percent of all problems.
    """

    def __init__(self, fails_after: int = 10**9) -> None:
        self.calls, self.fails_after, self.decoded = 0, fails_after, 0

    def measure(self, work: EngineWork, numbers: list[int]) -> EvaluationRow:
        self.calls += 1
        if self.calls > self.fails_after:
            raise RuntimeError("the evaluator broke")
        self.decoded += len(numbers)
        settings = work.decoding_settings
        threshold, refresh = settings["entropy_threshold"], settings["refresh_interval"]
        right, tokens = PROBLEMS * accuracy_of(threshold) / 100, round(1000 * tpf_of(threshold, refresh))
        samples = [EvaluatedSample("id", "", None, "1", k < right, tokens, 1000, 1, "stop") for k in numbers]
        labels = {"model": "m", "decoder": "d3llm", "task": "t", "settings": dict(settings), "max_tokens": 64}
        return summarise(samples, 1.0, temperature=0.0, seed=0, warmup=0, max_batch_size=1, **labels)

    def count(self) -> int:
        return self.decoded


def run_search(
    settings: TuneSettings, metric: Any = "aup", fails_after: int = 10**9, progress: Progress = QUIET
) -> tuple[list[TuneTrial], int]:
    """The trials, and how many problems were decoded for them."""
    settings = settings.model_copy(update={"count": PROBLEMS, "metric": metric, "actors": 1})
    engine = SyntheticEngine.remote(fails_after)
    work = EngineWork("t", "validation", PROBLEMS, {"decoder": "d3llm"}, warmup=0)
    objective = SearchObjective(metric, ANCHOR, 2.0)
    points = SPACE.first_points(published_settings("llada", "d3llm"), 2)
    trials = search(settings, SPACE, points, objective, EnginePool((engine,)), work, progress)
    return trials, ray.get(engine.count.remote())


@pytest.mark.usefixtures("ray_cluster")
def test_the_known_optimum_is_found_and_every_trial_is_on_the_board(tmp_path):
    trials, _ = run_search(TuneSettings(trials=14, output=tmp_path / "first"))
    assert len(trials) == 14
    assert trials[0].values == {"entropy_threshold": 0.45, "refresh_interval": 10000}  # the preset's own come first
    assert trials[1].values == {"entropy_threshold": 0.5, "refresh_interval": 10000}  # then the published ones
    assert trials[0].accuracy == 90.0 and trials[0].tpf == pytest.approx(3.8)
    best = best_trial(trials)
    assert best.values["refresh_interval"] == 4
    assert 0.6 < best.values["entropy_threshold"] <= 0.93  # beyond, more than five points are lost
    # independently of the package: anchor (1, 90), W = min(exp(-3 (1 - y/90)), 1)
    area = 90 + (best.tpf - 1) * (90 + best.accuracy * math.exp(-3 * (1 - best.accuracy / 90))) / 2
    assert best.score == pytest.approx(area) and best.score == max(trial.score for trial in trials)
    whole = [trial for trial in trials if not trial.stopped]
    assert {trial.problems for trial in whole} == {PROBLEMS}
    assert all(trial.problems < PROBLEMS and trial.score < best.score for trial in trials if trial.stopped)

    boards = [read_board(path) for path in sorted((tmp_path / "first/search").glob("*/events.out.tfevents.*"))]
    assert len(boards) == 14
    last = sorted((board["accuracy"][-1], board["tpf"][-1], board["aup"][-1], board["tps"][-1]) for board in boards)
    told = sorted((trial.accuracy, trial.tpf, trial.aup, trial.tps) for trial in trials)
    assert np.array(last) == pytest.approx(np.array(told), rel=1e-5)
    assert {len(board["accuracy"]) for board in boards} >= {4}  # a point after every shard
    assert all({"entropy_threshold", "refresh_interval"} <= set(board["hyperparameters"]) for board in boards)


def read_board(path: Path) -> dict[str, list[Any]]:
    """Values by name from one of TensorBoard's files: records of length (8 bytes), checksum (4), data, checksum (4)."""
    board, data = defaultdict(list), path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        for value in event.summary.value:
            if value.HasField("simple_value"):
                board[value.tag.removeprefix("ray/tune/")].append(value.simple_value)
            content = value.metadata.plugin_data.content
            board["hyperparameters"] += [name for name in SPACE.parameters if name.encode() in content]
    return board


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_race_saves_problems_and_does_not_change_the_winner(tmp_path):
    found = {}
    for racing in ("bound", "again", "none", "asha"):
        name = "bound" if racing == "again" else racing
        settings = TuneSettings(trials=20, racing=name, output=tmp_path / racing)
        found[racing] = run_search(settings)
    assert [trial.values for trial in found["bound"][0]] == [trial.values for trial in found["again"][0]]
    winners = {racing: best_trial(trials) for racing, (trials, _) in found.items()}
    assert winners["bound"].values == winners["none"].values
    assert winners["bound"].score == winners["none"].score
    assert found["bound"][1] < 0.8 * found["none"][1] == 0.8 * 20 * PROBLEMS
    assert found["asha"][1] < found["none"][1] and any(trial.stopped for trial in found["asha"][0])
    assert not any(trial.stopped for trial in found["none"][0])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("metric", ["aup", "accuracy-tpf"])
def test_a_failed_search_says_why_and_goes_on_where_it_stopped(tmp_path, metric):
    """Of a trial that was cut off between its shards, all shards are measured again."""
    settings = TuneSettings(trials=5, racing="bound", shards=2, output=tmp_path / "search")
    with pytest.raises(RuntimeError, match=r"[23] of 5 trials failed(.|\n)*the evaluator broke"):
        run_search(settings, metric, fails_after=5)
    trials, decoded = run_search(settings, metric)
    assert decoded <= 3 * PROBLEMS  # two are finished
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    assert trials[0].values == {"entropy_threshold": 0.45, "refresh_interval": 10000}
    for trial in trials:
        if not trial.stopped:
            assert trial.accuracy == pytest.approx(accuracy_of(trial.values["entropy_threshold"]), abs=0.3)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_objectives_find_a_front_of_accuracy_and_speed(tmp_path):
    trials, _ = run_search(TuneSettings(trials=24, output=tmp_path / "search"), "accuracy-tpf")
    front = pareto_front(trials)
    assert len(front) >= 2
    assert front[0].accuracy == 90.0 and front[-1].tpf > 7.0  # nothing is lost on one end, much gained on the other
    assert best_trial(trials).accuracy >= 88.0  # within max_accuracy_drop of the anchor


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_search_ends_with_its_time(tmp_path):
    notes = Notes()
    settings = TuneSettings(trials=1000, time_budget_s=45.0, output=tmp_path / "search")  # the first may take 25
    trials, _ = run_search(settings, progress=notes)
    assert 1 <= len(trials) < 1000
    assert notes.said == [f"time_budget_s: {len(trials)} of 1000 trials in 45 s"]


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
        held_out=4,
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

    behind = task.problems("validation", 14)[10:]
    rows = {row["name"]: row["figures"]["tpf"]["value"] for row in records["held_out"]["rows"]}
    found = {"chosen": evaluate(llm, task, behind, max_tokens=32, progress=QUIET).tpf}
    found["vanilla"] = evaluate(vanilla, task, behind, max_tokens=32, progress=QUIET).tpf
    assert rows.keys() == {"chosen", "own", "vanilla"} and rows.items() >= found.items()
    assert "The chosen settings" in (settings.output / "report.md").read_text()

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
