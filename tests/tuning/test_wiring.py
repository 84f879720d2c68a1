"""The verb's edge without Ray: settings arrive where they act, and what an earlier start has left is judged first."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from ray.exceptions import GetTimeoutError
from ray.tune.search.optuna import OptunaSearch

from d3llm_ray.config import build
from d3llm_ray.decoding import DiffusionLLM, decoder, decoding_settings
from d3llm_ray.errors import IncompleteError, InputError
from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow, summarise
from d3llm_ray.tasks import Problem, Task
from d3llm_ray.tuning import evaluators, records, trial
from d3llm_ray.tuning import run as verb
from d3llm_ray.tuning import search as searching
from d3llm_ray.tuning.evaluators import Evaluator, evaluator_pool
from d3llm_ray.tuning.objective import SearchObjective, TuneTrial
from d3llm_ray.tuning.settings import TuneSettings
from d3llm_ray.tuning.space import SearchSpace
from d3llm_ray.tuning.trial import measure, run_trial
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
    teacher, model, task = tmp_path / "teacher", tmp_path / "student", tmp_path / "task.jsonl"
    for folder in (teacher, model):
        shutil.copytree(tiny_checkpoint, folder)
    task.write_text("".join(json.dumps({"prompt": f"{n} + 1?", "reference": "7", "id": n}) + "\n" for n in range(9)))
    return TuneSettings(
        model=str(model),
        space=tmp_path / "space.yaml",
        task=str(task),
        split="train",
        count=7,
        trials=12,
        metric="tps",
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


@pytest.mark.parametrize(("device", "threads"), [("cuda:3", []), ("cpu", [4])])
def test_settings_arrive_in_an_evaluator(
    settings: TuneSettings, monkeypatch: pytest.MonkeyPatch, device: str, threads: list[int]
) -> None:
    asked: dict[str, Any] = {"threads": []}
    problems = [Problem(str(number), [{"role": "user", "content": "?"}], "1") for number in range(7)]

    def load(split: str, count: int) -> list[Problem]:
        asked.update(split=split, count=count)
        return problems

    monkeypatch.setattr(evaluators, "load_task", lambda *words: asked.update(task=words) or Task("t", load))
    monkeypatch.setattr(evaluators.torch, "set_num_threads", asked["threads"].append)
    from_pretrained = lambda *words, **named: asked.update(model=(words, named)) or "the model"  # noqa: E731
    monkeypatch.setattr(evaluators.DiffusionLLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(evaluators, "evaluate", lambda *words, **named: (words, named))
    plain = Evaluator.__ray_metadata__.modified_class  # type: ignore[attr-defined]
    settings = settings.model_copy(update={"device": device})
    words, named = plain(settings, 1).measure({"decoder": "vanilla", "steps": 5})
    assert asked == {
        "threads": threads,
        "task": (settings.task, settings.data_dir),
        "split": "train",
        "count": 7,
        "model": ((settings.model,), {"dtype": "bfloat16", "device": device, "max_batch_size": 6}),
    }
    assert words[0] == "the model" and words[1].name == "t"
    assert [item.id for item in words[2]] == ["1", "4"]  # every third from the second on
    assert words[3:6] == (48, 0.7, 11)
    assert named == {"top_p": 0.6, "warmup": 1, "decoder": "vanilla", "steps": 5}
    tpf = plain(settings.model_copy(update={"metric": "tpf"}), 0).measure({})
    assert tpf[1] == {"top_p": 0.6, "warmup": 0} and [item.id for item in tpf[0][2]] == ["0", "3", "6"]


def test_settings_arrive_in_the_pool(settings: TuneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    killed: list[Any] = []

    def options(**named: Any) -> Any:
        def remote(given: TuneSettings, part: int) -> Any:
            made.append((named, given, part))
            return SimpleNamespace(part=part, ready=SimpleNamespace(remote=lambda: part))

        return SimpleNamespace(remote=remote)

    waits: list[Any] = []
    ray = SimpleNamespace(get=lambda ready, timeout: waits.append((ready, timeout)), kill=killed.append)
    monkeypatch.setattr(evaluators, "Evaluator", SimpleNamespace(options=options))
    monkeypatch.setattr(evaluators, "ray", ray)
    with evaluator_pool(settings) as pool:
        assert [actor.part for actor in pool] == [0, 1, 2] and killed == []
    assert made == [({"num_cpus": 4, "num_gpus": 0.25}, settings, part) for part in range(3)]
    assert waits == [([0, 1, 2], 17.0)]
    assert killed == pool

    def too_late(_ready: Any, timeout: float) -> None:
        raise GetTimeoutError

    ray.get, ray.available_resources = too_late, lambda: {"CPU": 2.0}
    line = r"^actors: 3 of 4 CPUs and 0.25 GPUs did not start in 17 s \(resource_timeout_s\); free .*: 2 CPUs, 0 GPUs$"
    with pytest.raises(InputError, match=line), evaluator_pool(settings):
        pass
    assert len(killed) == 6


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
    domains = {name: searching._domain(parameter) for name, parameter in space.parameters.items()}
    assert OptunaSearch.convert_search_space(domains) == {
        "entropy_threshold": FloatDistribution(0.1, 3.0, log=True),
        "cache_delay": IntDistribution(1, 3),
        "refresh_interval": CategoricalDistribution([4, 10000]),
        "block_add_threshold": FloatDistribution(0.2, 0.9),
    }


def test_settings_arrive_in_the_search(settings: TuneSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: dict[str, dict[str, Any]] = {}

    def remember(name: str) -> Callable[..., Any]:
        return lambda *words, **named: made.update({name: named | ({"words": words} if words else {})}) or name

    sampler, real = optuna.samplers.TPESampler, searching.tune
    monkeypatch.setattr(optuna.samplers, "TPESampler", lambda **named: made.update(sampler=named) or sampler(**named))
    monkeypatch.setattr(searching, "OptunaSearch", remember("search"))
    names = {name: remember(name) for name in ("TuneConfig", "RunConfig", "Tuner")}
    domains = {name: getattr(real, name) for name in ("choice", "randint", "loguniform", "uniform", "Callback")}
    monkeypatch.setattr(searching, "tune", SimpleNamespace(**domains, **names))
    space = verb.read_space(settings.space)
    searching._new_tuner(settings, space, "the trainable", tmp_path / "tuned" / "search")
    assert made["sampler"] == {"seed": 11, "n_startup_trials": 4}
    assert (made["search"]["metric"], made["search"]["mode"]) == ("score", "max")
    assert made["search"]["points_to_evaluate"] == [{"entropy_threshold": 0.45}]  # the preset's own
    config = made["TuneConfig"]
    assert (config["num_samples"], config["max_concurrent_trials"]) == (12, 5)
    assert (config["search_alg"], config["metric"], config["mode"]) == ("search", "score", "max")
    assert (made["RunConfig"]["name"], made["RunConfig"]["storage_path"]) == ("search", str(tmp_path / "tuned"))
    assert made["Tuner"]["words"] == ("the trainable",)
    assert made["Tuner"]["param_space"].keys() == {"entropy_threshold"}
    assert (made["Tuner"]["tune_config"], made["Tuner"]["run_config"]) == ("TuneConfig", "RunConfig")


def test_a_row_of_all_evaluators_is_in_the_task_s_order(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = row_of(3, 5, 10, 4, p3="a reason")
    parts = [
        summarise(whole.samples[part::2], seconds, **{name: getattr(whole, name) for name in trial._LABELS})
        for part, seconds in ((0, 4.0), (1, 2.5))
    ]
    asked: list[Any] = []
    actors = [
        SimpleNamespace(measure=SimpleNamespace(remote=lambda given, row=row: asked.append(given) or row))
        for row in parts
    ]
    monkeypatch.setattr(trial, "ray", SimpleNamespace(get=list))
    row = measure(actors, {"decoder": "vanilla"})
    assert asked == [{"decoder": "vanilla"}] * 2
    assert [sample.problem_id for sample in row.samples] == ["p0", "p1", "p2", "p3", "p4"]
    assert (row.accuracy, row.seconds, row.tps, row.errors) == (60.0, 4.0, 12.5, 1)


def test_a_trial_reports_what_it_has_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    row = row_of(8, 10, 30, 10, p9="a reason")
    monkeypatch.setattr(trial, "measure", lambda pool, chosen: asked.update(pool=pool, chosen=chosen) or row)
    monkeypatch.setattr(trial.tune, "report", asked.update)
    base = {"decoder": "d3llm", "entropy_threshold": 0.1, "cache_delay": 2}
    run_trial({"entropy_threshold": 0.9}, "the pool", SearchObjective("tpf", (1.0, 81.0), 2.0), base)
    assert asked["pool"] == "the pool"
    assert asked["chosen"] == {"decoder": "d3llm", "entropy_threshold": 0.9, "cache_delay": 2}
    figures = {name: asked[name] for name in ("score", "accuracy", "tpf", "tokens", "forwards", "seconds", "errors")}
    assert figures == dict(score=3.0, accuracy=80.0, tpf=3.0, tokens=300, forwards=100, seconds=2.0, errors=1)
    found = searching._trial(4, {"entropy_threshold": 0.9}, asked)
    assert found == TuneTrial(
        4, {"entropy_threshold": 0.9}, 3.0, 80.0, 3.0, 150.0, 300, 100, 2.0, 1, ("problem 10 ('p9'): a reason",)
    )


@pytest.fixture
def search(settings: TuneSettings, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for Ray, evaluators and search: `pools` that were opened, `asked` of them, `objective`; answers `row`."""
    stand = SimpleNamespace(pools=[], asked=[], objective=None, row=row_of(4, 5, 3, 4), trials=None, stop=False)

    @contextmanager
    def pool(given: TuneSettings) -> Iterator[Any]:
        stand.pools.append(given.model)
        yield given.model

    def measured(opened: Any, chosen: dict[str, Any]) -> EvaluationRow:
        stand.asked.append((opened, chosen))
        return stand.row

    def searched(given: TuneSettings, space: SearchSpace, objective: Any, opened: Any, _progress: Any) -> Any:
        stand.objective, stand.searched = objective, (given, space, opened)
        if stand.stop:
            raise KeyboardInterrupt
        return stand.trials or [TuneTrial(0, {"entropy_threshold": 0.45}, 1.0, 80.0, 2.0, 9.0, 10, 5, 1.0)]

    for name, value in {
        "connect": lambda: None,
        "evaluator_pool": pool,
        "measure": measured,
        "search": searched,
    }.items():
        monkeypatch.setattr(verb, name, value)
    monkeypatch.setattr(records, "plot_trials", lambda *_: None)  # takes longer than all else here
    return stand


def test_settings_arrive_in_the_objective(settings: TuneSettings, search: SimpleNamespace) -> None:
    verb.run(settings, Notes())
    assert search.objective == SearchObjective("tps", (0.75, 81.0), 3.5)
    assert search.searched[0] == settings and search.searched[2] == settings.model
    assert search.searched[1].decoder_settings == {"cache_delay": 2}
    assert (search.pools, search.asked) == ([settings.model], [])  # the anchor is given
    assert yaml.safe_load((settings.output / "settings.yaml").read_text()) == {
        "decoder": "d3llm",
        "cache_delay": 2,
        "entropy_threshold": 0.45,
    }


def test_an_interrupted_search_goes_on_with_its_anchor(settings: TuneSettings, search: SimpleNamespace) -> None:
    settings = settings.model_copy(update={"anchor": None})
    plain = decoding_settings(decoder("vanilla"))
    search.stop = True
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            verb.run(settings, Notes())
        assert search.objective.anchor == (0.75, 80.0)  # 3 tokens in 4 forwards, 4 of 5 right
        search.row = None
    assert search.asked == [(settings.anchor_model, plain)]
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
    ((opened, chosen),) = search.asked
    assert opened == search.pools[0] == (anchor_model or model)
    assert plain.items() <= chosen.items()
    (output,) = DiffusionLLM.from_pretrained(opened).generate(["Tom has 5 apples."], max_tokens=16, **chosen)
    revealed = [step for step in output.reveal_steps if step >= 0]
    assert 8 <= len(revealed) <= output.forwards + 1  # Dream's schedule ends with two at once


@pytest.mark.parametrize(
    "left",
    [
        "tpf: 9.0\naccuracy: 99.0\n",  # another version's
        "tpf: 9.0\naccuracy: 99.0\nkey: of other settings\nunanswered: []\n",
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
    assert len(search.asked) == 2 and search.objective.anchor == (0.75, 80.0)
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
            f"problems: answers are missing: 2, counted as wrong; the others are in {settings.output}/trials.json: "
            "problem 5 ('p4'): not finite; problem 3 (7): refused"
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
    assert len(notes.said) == 1 and notes.said[0].startswith("searched again: ") and name in notes.said[0]
    assert (settings.output / name).read_text() == whole and len(search.pools) == 2
    path.write_text("decoder: d3llm\nentropy_threshold: 0.2\n")  # a user's own change stays
    verb.run(settings, Notes())
    assert yaml.safe_load(path.read_text())["entropy_threshold"] == 0.2 and len(search.pools) == 2


def test_a_task_without_references_is_refused_before_ray_starts(
    settings: TuneSettings, search: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "connect", lambda: pytest.fail("Ray was started"))
    Path(settings.task).write_text('{"prompt": "a"}\n' * 9)
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
    old = [TuneTrial(n, {}, 99.0, 80.0, tpf, 9.0, 9, 5, 1.0) for n, tpf in enumerate((2.0, 4.0))]
    fake = SimpleNamespace(with_resources=lambda *_: None, with_parameters=lambda *_, **__: None)
    monkeypatch.setattr(searching, "tune", fake)
    monkeypatch.setattr(searching, "_restored_tuner", lambda *_: SimpleNamespace(fit=lambda: "grid"))
    monkeypatch.setattr(searching, "_trials", lambda grid, expected: old)
    space = verb.read_space(settings.space)
    trials = searching.search(settings, space, SearchObjective("tpf", (1.0, 81.0), 2.0), [], Notes())
    assert [found.score for found in trials] == [2.0, 4.0]
