"""The verb's edge without Ray: settings arrive where they act, and what an earlier start has left is judged first."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune.search.optuna import OptunaSearch

from d3llm_ray.config import build
from d3llm_ray.decoding import DiffusionLLM, decoder, decoding_settings
from d3llm_ray.errors import IncompleteError, InputError, WorkError
from d3llm_ray.evaluation.pool import EnginePool, EngineWork
from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow, labels_of, summarise
from d3llm_ray.tuning import held_out, plots, trial
from d3llm_ray.tuning import run as verb
from d3llm_ray.tuning import search as searching
from d3llm_ray.tuning.domains import domains
from d3llm_ray.tuning.objective import SearchObjective, TuneTrial
from d3llm_ray.tuning.racing import ExpectedFigures, Racing
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.tuning.space import SearchSpace
from d3llm_ray.tuning.trial import run_trial
from tests.wiring import Notes

SPACE = """
decoder: d3llm
decoder_settings: {cache_delay: 2}
parameters: {entropy_threshold: {type: float, low: 0.1, high: 4}}
"""
BLOCKS = "decoder: fast-dllm-v2\nparameters: {confidence_threshold: {type: float, low: 0.2, high: 1}}\n"


def row_of(right: int, count: int, tokens: int, forwards: int, seconds: float = 2.0, **errors: str) -> EvaluationRow:
    """A row of `count` problems called p0 and on, the first `right` of them right; `errors`: reasons by name."""
    names = [f"p{number}" for number in range(count)]
    samples = [
        EvaluatedSample(n, "", None, "1", k < right, tokens, forwards, 1, "stop", n, errors.get(n))
        for k, n in enumerate(names)
    ]
    labels = {"model": "m", "decoder": "d3llm", "task": "t", "settings": {}, "max_tokens": 64, "temperature": 0.0}
    return summarise(samples, seconds, seed=0, warmup=0, max_batch_size=1, **labels)


@pytest.fixture
def settings(tiny_checkpoint: Path, tmp_path: Path) -> TuneSettings:
    """Every field has a value of its own."""
    (tmp_path / "space.yaml").write_text(SPACE)
    (tmp_path / "data").mkdir()
    teacher, model, task = tmp_path / "teacher", tmp_path / "student", tmp_path / "task.jsonl"
    for folder in (teacher, model):
        shutil.copytree(tiny_checkpoint, folder)
    task.write_text("".join(json.dumps({"prompt": f"{n} + 1?", "reference": "7", "id": n}) + "\n" for n in range(12)))
    return TuneSettings(
        model=str(model),
        space=tmp_path / "space.yaml",
        task=str(task),
        split="train",
        count=7,
        held_out=5,
        trials=12,
        metric="tps",
        racing="asha",
        shards=2,
        time_budget_s=1000.0,
        max_accuracy_drop=3.5,
        anchor=(0.75, 81.0),
        anchor_model=str(teacher),
        actors=3,
        cpus_per_actor=4,
        gpus_per_actor=0.25,
        concurrent_trials=5,
        resource_timeout_s=17.0,
        max_tokens=48,
        temperature=0.7,
        top_p=0.6,
        data_dir=tmp_path / "data",
        seed=11,
        max_batch_size=6,
        dtype="bfloat16",
        device="cuda:3",
        output=tmp_path / "tuned",
    )


def test_no_field_has_its_default(settings: TuneSettings) -> None:
    defaults = {name: field.get_default() for name, field in TuneSettings.model_fields.items()}
    assert [name for name, value in defaults.items() if getattr(settings, name) == value] == []


def test_a_search_draws_from_the_space_with_both_ends() -> None:
    space = SearchSpace(
        decoder="d3llm",
        parameters={
            "entropy_threshold": {"type": "log_float", "low": 0.1, "high": 3.0},
            "cache_delay": {"type": "int", "low": 1, "high": 3},
            "refresh_interval": {"type": "choice", "values": [4, 10000]},
            "block_add_threshold": {"type": "float", "low": 0.2, "high": 0.9},
        },
    )
    assert OptunaSearch.convert_search_space(domains(space)) == {
        "entropy_threshold": FloatDistribution(0.1, 3.0, log=True),
        "cache_delay": IntDistribution(1, 3),
        "refresh_interval": CategoricalDistribution([4, 10000]),
        "block_add_threshold": FloatDistribution(0.2, 0.9),
    }


TPS = SearchObjective("tps", (0.75, 81.0), 3.5)


def test_settings_arrive_in_the_search(settings: TuneSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: dict[str, dict[str, Any]] = {}

    def remember(name: str) -> Callable[..., Any]:
        return lambda *words, **named: made.update({name: named | ({"words": words} if words else {})}) or name

    sampler, real = optuna.samplers.TPESampler, searching.tune
    monkeypatch.setattr(optuna.samplers, "TPESampler", lambda **named: made.update(sampler=named) or sampler(**named))
    monkeypatch.setattr(searching, "OptunaSearch", remember("search"))
    monkeypatch.setattr(searching, "ASHAScheduler", remember("asha"))
    names = {name: remember(name) for name in ("TuneConfig", "RunConfig", "Tuner")}
    monkeypatch.setattr(searching, "tune", SimpleNamespace(Callback=real.Callback, **names))
    space, points = verb.read_space(settings.space), [{"entropy_threshold": 0.45}]
    searching._new_tuner(settings, space, points, TPS, "the trainable", tmp_path / "tuned" / "search")
    assert made["sampler"] == {"seed": 11, "n_startup_trials": 4}
    assert (made["search"]["metric"], made["search"]["mode"]) == ("score", "max")
    assert made["search"]["points_to_evaluate"] == points
    config = made["TuneConfig"]
    assert (config["num_samples"], config["max_concurrent_trials"], config["time_budget_s"]) == (12, 5, 1000.0)
    assert (config["search_alg"], config["scheduler"]) == ("search", "asha")
    assert made["asha"] == dict(metric="score", mode="max", max_t=2, grace_period=1, reduction_factor=3)
    assert (made["RunConfig"]["name"], made["RunConfig"]["storage_path"]) == ("search", str(tmp_path / "tuned"))
    assert isinstance(made["RunConfig"]["callbacks"][0], ExpectedFigures)  # the loggers, which come after, write these
    assert made["Tuner"]["words"] == ("the trainable",)
    assert made["Tuner"]["param_space"].keys() == {"entropy_threshold"}
    assert (made["Tuner"]["tune_config"], made["Tuner"]["run_config"]) == ("TuneConfig", "RunConfig")


def test_a_race_is_chosen_and_has_its_shards(settings: TuneSettings) -> None:
    bound, none = (settings.model_copy(update={"racing": name}) for name in ("bound", "none"))
    assert isinstance(searching._scheduler(bound, TPS), Racing) and searching._scheduler(none, TPS) is None
    shards = [searching._shards(one) for one in (bound, none, bound.model_copy(update={"shards": 9, "count": 14}))]
    assert shards == [2, 1, 4]  # with 3 actors at most 4 shards of 14 problems
    with pytest.raises(InputError, match="racing: got 'asha' with metric accuracy-tpf; accepted: bound or none"):
        build(TuneSettings, {"racing": "asha", "metric": "accuracy-tpf"})


def test_two_objectives_are_searched_by_nsga_ii(settings: TuneSettings) -> None:
    sampler = searching._sampler(settings.model_copy(update={"trials": 60}), several=True)
    assert isinstance(sampler, optuna.samplers.NSGAIISampler) and sampler._population_size == 12


def test_a_trial_reports_what_it_has_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten problems in two shards, numbers as dealt: after each all figures so far."""
    whole = row_of(8, 10, 30, 10, p9="a reason")
    work = EngineWork("t", "train", 10, {"decoder": "d3llm", "entropy_threshold": 0.1, "cache_delay": 2}, {"seed": 3})
    asked: list[Any] = []
    reports: list[dict[str, Any]] = []

    class Pool(EnginePool):
        def measure(self, given: EngineWork, numbers: Any) -> EvaluationRow:
            asked.append((given, numbers))
            samples = [whole.samples[number] for number in numbers]
            return summarise(samples, 2.0, **labels_of(whole))

    monkeypatch.setattr(trial.tune, "report", reports.append)
    objective, shards = SearchObjective("tpf", (1.0, 81.0), 2.0), [[9, 0, 1, 2, 3, 4], [5, 6, 7, 8]]
    run_trial({"entropy_threshold": 0.9}, Pool(()), work, objective, shards)
    given = replace(work, decoding_settings={"decoder": "d3llm", "entropy_threshold": 0.9, "cache_delay": 2})
    assert asked == [(given, shards[0]), (given, shards[1])]
    first, last = reports
    assert (first["problems"], first["shards_left"], first["accuracy"]) == (6, 1, pytest.approx(500 / 6))
    assert first["score"] == 3.0 and first["aup"] == objective.aup(3.0, 500 / 6)
    assert first["outcomes"] == "[[0,30,10],[1,30,10],[1,30,10],[1,30,10],[1,30,10],[1,30,10]]"
    figures = {name: last[name] for name in ("score", "accuracy", "tpf", "tokens", "forwards", "seconds", "errors")}
    assert figures == dict(score=3.0, accuracy=80.0, tpf=3.0, tokens=300, forwards=100, seconds=4.0, errors=1)
    found = searching._trial(4, {"entropy_threshold": 0.9}, last)
    lost = ("problem 10 ('p9'): a reason",)
    assert found == TuneTrial(
        4, {"entropy_threshold": 0.9}, 3.0, 80.0, 3.0, 75.0, 300, 100, 4.0, 1, lost, 10, False, last["aup"]
    )
    assert searching._trial(4, {}, first).stopped and searching._trial(4, {}, first).unanswered == lost


@pytest.fixture
def search(settings: TuneSettings, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for Ray, engines and search: `pools` that were opened, `asked` of them, `objective`; answers `row`."""
    stand = SimpleNamespace(pools=[], asked=[], objective=None, row=row_of(4, 5, 3, 4), trials=None, stop=False)

    class Pool:
        def __init__(self, model: str) -> None:
            self.model = model

        def measure(self, work: EngineWork, numbers: Any) -> EvaluationRow:
            stand.asked.append((self.model, work, list(numbers)))
            return replace(stand.row, settings=dict(work.decoding_settings))

    @contextmanager
    def pool(given: TuneSettings) -> Iterator[Any]:
        stand.pools.append(given.model)
        yield Pool(given.model)

    def searched(given: TuneSettings, space: SearchSpace, points: Any, objective: Any, *others: Any) -> Any:
        stand.objective, stand.searched = objective, (given, space, points, *others)
        if stand.stop:
            raise KeyboardInterrupt
        return stand.trials or [TuneTrial(0, {"entropy_threshold": 0.3}, 1.0, 80.0, 2.0, 9.0, 10, 5, 1.0)]

    for name, value in {"connect": lambda: None, "engine_pool": pool, "search": searched}.items():
        monkeypatch.setattr(verb, name, value)
    monkeypatch.setattr(plots, "plot_trials", lambda *_: None)  # takes longer than all else here
    monkeypatch.setattr(held_out, "RESAMPLES", 20)
    return stand


def test_settings_arrive_in_the_objective(settings: TuneSettings, search: SimpleNamespace) -> None:
    verb.run(settings, Notes())
    assert search.objective == TPS
    given, space, points, pool, work, _ = search.searched
    assert given == settings and pool.model == settings.model and space.decoder_settings == {"cache_delay": 2}
    assert points[:3] == [{"entropy_threshold": threshold} for threshold in (0.45, 0.5, 0.4)]  # own, then published
    sampling = {"max_tokens": 48, "temperature": 0.7, "top_p": 0.6, "seed": 11}
    own = {"decoder": "d3llm", "cache_delay": 2}
    assert work == EngineWork(settings.task, "train", 12, own, sampling, 1, {"data_dir": settings.data_dir})
    chosen = own | {"entropy_threshold": 0.3}
    behind = [7, 8, 9, 10, 11]
    assert search.asked == [  # the anchor is given
        (settings.model, work, behind),
        (settings.model, replace(work, decoding_settings=chosen), behind),
    ]
    assert search.pools == [settings.model]
    assert yaml.safe_load((settings.output / "settings.yaml").read_text()) == chosen
    found = json.loads((settings.output / "trials.json").read_text())["held_out"]
    assert found["problems"] == 5 and [row["name"] for row in found["rows"]] == ["chosen", "own"]


def test_without_time_nothing_is_warmed_up_and_without_held_out_problems_nothing_compared(
    settings: TuneSettings, search: SimpleNamespace
) -> None:
    notes = Notes()
    verb.run(settings.model_copy(update={"metric": "smooth-aup", "held_out": 0}), notes)
    work = search.searched[4]
    assert (work.warmup, work.count, search.asked, notes.said) == (0, 7, [], [])
    assert json.loads((settings.output / "trials.json").read_text())["held_out"] is None


def test_a_task_with_fewer_problems_than_asked_for_says_so(settings: TuneSettings, search: SimpleNamespace) -> None:
    notes = Notes()
    verb.run(settings.model_copy(update={"held_out": 9}), notes)
    assert notes.said[0] == f"held_out: 5 problems instead of 9: {settings.task} has no others"
    verb.run(settings.model_copy(update={"count": 20, "output": settings.output.with_name("other")}), notes)
    given, _, _, _, work, _ = search.searched
    assert (given.count, work.count) == (12, 12)


def test_an_interrupted_search_goes_on_with_its_anchor(settings: TuneSettings, search: SimpleNamespace) -> None:
    settings = settings.model_copy(update={"anchor": None})
    plain = decoding_settings(decoder("vanilla"))
    search.stop = True
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            verb.run(settings, Notes())
        assert search.objective.anchor == (0.75, 80.0)  # 3 tokens in 4 forwards, 4 of 5 right
        search.row = None
    (first, work, numbers), (second, _, behind) = search.asked
    assert first == second == settings.anchor_model and (numbers, behind) == ([*range(7)], [*range(7, 12)])
    assert work.decoding_settings == plain
    assert search.pools == [settings.anchor_model, settings.model, settings.model]


@pytest.mark.parametrize(
    ("model", "anchor_model", "plain"),
    [
        ("tiny-fast-dllm-v2", None, {"decoder": "fast-dllm-v2", "confidence_threshold": 1.0}),
        ("tiny-fast-dllm-v2", "tiny-ar", {"decoder": "autoregressive"}),
        ("tiny-fast-dllm-v2", "tiny-dream", {"decoder": "vanilla", "steps": None}),
    ],
)
def test_the_anchor_is_one_token_a_forward_of_its_own_family(
    settings: TuneSettings, search: SimpleNamespace, model: str, anchor_model: str | None, plain: dict[str, Any]
) -> None:
    settings.space.write_text(BLOCKS)
    search.trials = [TuneTrial(0, {"confidence_threshold": 0.9}, 1.0, 80.0, 2.0, 9.0, 10, 5, 1.0)]
    verb.run(settings.model_copy(update={"model": model, "anchor_model": anchor_model, "anchor": None}), Notes())
    opened, work, _ = search.asked[0]
    assert opened == search.pools[0] == (anchor_model or model)
    chosen = work.decoding_settings
    assert plain.items() <= chosen.items()
    (output,) = DiffusionLLM.from_pretrained(opened).generate(["Tom has 5 apples."], max_tokens=16, **chosen)
    revealed = [step for step in output.reveal_steps if step >= 0]
    assert 8 <= len(revealed) <= output.forwards + 1  # Dream's schedule ends with two at once


@pytest.mark.parametrize(
    "left",
    [
        "tpf: 9.0\naccuracy: 99.0\n",  # another version's
        "tpf: 9.0\naccuracy: 99.0\nkey: of other settings\nunanswered: []\nheld_out: ''\nheld_out_tps: 0\n",
        "tpf: 9.0\naccuracy: 99.0\nkey: of other settings\nunanswered: []\nheld_out: '[[1,'\nheld_out_tps: 2\n",
        "tpf: 9.0\naccu",
        "tpf: [\n",
        "- 9.0\n",
        "",
    ],
)
def test_a_stale_or_torn_anchor_is_said_and_measured_again(
    settings: TuneSettings, search: SimpleNamespace, left: str
) -> None:
    settings = settings.model_copy(update={"anchor": None})
    search.stop = True
    with pytest.raises(KeyboardInterrupt):
        verb.run(settings, Notes())
    (settings.output / "anchor.yaml").write_text(left)
    notes = Notes()
    with pytest.raises(KeyboardInterrupt):
        verb.run(settings, notes)
    assert len(search.asked) == 4 and search.objective.anchor == (0.75, 80.0)
    assert len(notes.said) == 1 and notes.said[0].startswith("the anchor is measured again: anchor: ")


def test_another_search_is_not_continued(
    settings: TuneSettings, search: SimpleNamespace, tiny_checkpoint: Path
) -> None:
    """Whatever its figures depend on is changed in turn, under the same names."""
    settings = settings.model_copy(update={"anchor": None})
    search.stop = True
    with pytest.raises(KeyboardInterrupt):
        verb.run(settings, Notes())
    search.stop = False
    for name, value in TuneSettings.model_fields.items():
        if name in ("model", "space", "task", "anchor_model", "output", "split"):
            continue
        other = build(TuneSettings, settings.model_dump() | {name: value.get_default()})
        if other != settings:
            with pytest.raises(InputError, match=r"output: .*tune.yaml belongs to another search"):
                verb.run(other, Notes())
    files = {
        Path(settings.task): "problems.json",
        settings.space: "space.yaml",
        Path(settings.model) / "config.json": "model.json",
        Path(str(settings.anchor_model)) / "config.json": "anchor_model.json",
    }
    for file, claim in files.items():
        text = file.read_text()
        changed = text.replace("4 + 1?", "4 + 2?").replace("high: 4", "high: 5").replace('"d_model"', ' "d_model"')
        file.write_text(changed)
        assert changed != text
        with pytest.raises(
            InputError, match=f"output: .*{claim} belongs to another search; accepted: the same model, "
        ):
            verb.run(settings, Notes())
        file.write_text(text)
        shutil.copystat(tiny_checkpoint / "config.json", file)
    (settings.output / "tune.yaml").touch()
    (settings.output / "model.json").write_bytes(b"\xff")
    with pytest.raises(InputError, match="model.json belongs to another search"):
        verb.run(settings, Notes())
    (settings.output / "problems.json").unlink()  # as an earlier version leaves it: what was searched is not known
    with pytest.raises(InputError, match=r"(model|problems).json belongs to another search"):
        verb.run(settings, Notes())


def test_problems_without_an_answer_are_named_whenever_the_search_is_asked_for(
    settings: TuneSettings, search: SimpleNamespace
) -> None:
    settings = settings.model_copy(update={"anchor": None})
    search.row = row_of(4, 5, 3, 4, p4="not finite")
    lost = ("problem 3 (7): refused", "problem 5 ('p4'): not finite")
    search.trials = [TuneTrial(n, {"entropy_threshold": 0.4}, 1.0, 8.0, 2.0, 9.0, 9, 5, 1.0, 2, lost) for n in range(2)]
    for _ in range(2):
        with pytest.raises(IncompleteError) as caught:
            verb.run(settings, Notes())
        assert str(caught.value) == (
            f"problems: answers are missing: 3, counted as wrong; the others are in {settings.output}/trials.json: "
            "problem 5 ('p4'): not finite; problem 12 ('p4'): not finite; problem 3 (7): refused"
        )
    assert verb.run(settings, Notes(), "return") == settings.output / "settings.yaml"
    assert len(search.pools) == 2  # complete: nothing is searched again
    assert (settings.output / "settings.yaml").is_file()
    header, first, _ = (settings.output / "trials.csv").read_text().splitlines()
    assert dict(zip(header.split(","), first.split(","), strict=True))["errors"] == "2"


@pytest.mark.parametrize(
    ("name", "text"),
    [("settings.yaml", ""), ("settings.yaml", "decoder: [\n"), ("trials.json", '{"trials": [{'), ("trials.json", "[]")],
)
def test_damaged_records_are_said_and_made_again(
    settings: TuneSettings, search: SimpleNamespace, name: str, text: str
) -> None:
    path = verb.run(settings, Notes())
    whole = (settings.output / name).read_text()
    (settings.output / name).write_text(text)
    notes = Notes()
    assert verb.run(settings, notes) == path
    said, _ = notes.said  # the other is the verdict on held-out problems
    assert said.startswith("searched again: ") and name in said
    assert (settings.output / name).read_text() == whole and len(search.pools) == 2
    path.write_text("decoder: d3llm\nentropy_threshold: 0.2\n")  # a user's own change stays
    verb.run(settings, Notes())
    assert yaml.safe_load(path.read_text())["entropy_threshold"] == 0.2 and len(search.pools) == 2


def test_a_task_without_references_is_refused_before_ray_starts(
    settings: TuneSettings, search: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "connect", lambda: pytest.fail("Ray was started"))
    Path(settings.task).write_text("".join(f'{{"prompt": "{n}"}}\n' for n in range(12)))
    with pytest.raises(InputError, match=r"problem .*: reference: got None"):
        verb.run(settings, Notes())


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("unrelated", b"", "tuner.pkl"),  # stopped before Tune wrote it
        ("tuner.pkl", pickle.dumps("torn")[:-5], "UnpicklingError"),
        ("searcher-state-1.pkl", pickle.dumps("torn")[:-5], "UnpicklingError"),
        ("search_gen_state-1.json", pickle.dumps("torn")[:-5], "UnpicklingError"),
        ("experiment_state-1.json", b'{"trial_data": [["torn', "JSONDecodeError"),
        ("experiment_state-1.json", b'{"trial_data": []}', "experiment_state-1.json has no trial"),
        ("experiment_state-1.json", b"{}", "KeyError: 'trial_data'"),
    ],
)
def test_a_torn_state_is_set_aside_and_said(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    for attempt in range(2):
        folder.mkdir()
        (folder / "experiment_state-0.json").write_text('{"trial_data": [["{}", "{}"]]}')
        (folder / name).write_bytes(content)
        notes = Notes()
        assert searching._restored_tuner(lambda config: None, folder, notes) is None
        assert len(notes.said) == 1 and notes.said[0].startswith("the search begins anew") and reason in notes.said[0]
        aside = tmp_path / f"search.unusable-{attempt}"
        assert not folder.exists() and (aside / name).read_bytes() == content and str(aside) in notes.said[0]
    assert searching._restored_tuner(lambda config: None, folder, notes) is None and len(notes.said) == 1


def test_scores_are_those_of_the_objective_whatever_a_restored_trial_was_scored_by(
    settings: TuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [TuneTrial(n, {}, 99.0, 80.0, tpf, 9.0, 9, 5, 1.0, aup=99.0) for n, tpf in enumerate((2.0, 4.0))]
    fake = SimpleNamespace(with_resources=lambda *_: None, with_parameters=lambda *_, **__: None)
    monkeypatch.setattr(searching, "tune", fake)
    monkeypatch.setattr(searching, "_restored_tuner", lambda *_: SimpleNamespace(fit=lambda: "grid"))
    monkeypatch.setattr(searching, "_trials", lambda grid, expected, spent: old * 6)
    space = verb.read_space(settings.space)
    objective = SearchObjective("tpf", (1.0, 81.0), 2.0)
    work = EngineWork("t", "train", 7, {})
    trials = searching.search(settings, space, [], objective, EnginePool(()), work, Notes())
    assert [found.score for found in trials[:2]] == [2.0, 4.0]
    assert [found.aup for found in trials[:2]] == [objective.aup(2.0, 80.0), objective.aup(4.0, 80.0)]


def result(number: int, shards_left: int = 0, done: bool = True) -> Any:
    figures = dict.fromkeys(trial.FIGURES, 1) | {"score": 1.0, "aup": 1.0, "unanswered": "[]"}
    return SimpleNamespace(
        config={}, metrics={**figures, "finished": -number, "shards_left": shards_left, "done": done}
    )


def test_what_a_search_that_ran_out_of_time_has_finished_counts() -> None:
    class Grid(list[Any]):
        num_errors = 0

    grid: Any = Grid([result(0), result(1, 2), result(2, 2, done=False), SimpleNamespace(config={}, metrics=None)])
    found = searching._trials(grid, 9, spent=True)
    assert [(one.number, one.stopped) for one in found] == [(0, True), (1, False)]  # by the time of their end
    with pytest.raises(KeyboardInterrupt, match="2 of 9 trials"):
        searching._trials(grid, 9, spent=False)
    with pytest.raises(WorkError, match="time_budget_s: no trial was finished"):
        searching._trials(Grid([result(1, 2)]), 9, spent=True)  # type: ignore[arg-type]
