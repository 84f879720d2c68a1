"""Every setting of `evaluate`, set to a value of its own, arrives in the model, in the measurement and in its name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d3llm_ray.config import build
from d3llm_ray.decoding import DiffusionLLM, Output, decoder, decoding_settings
from d3llm_ray.evaluation import run as verb
from d3llm_ray.evaluation.evaluate import evaluate
from d3llm_ray.evaluation.rows import EvaluatedSample, EvaluationRow, summarise
from d3llm_ray.evaluation.settings import EvaluateSettings, Pair
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import Problem, load_task

QUIET = Progress(quiet=True)
GIVEN: dict[str, Any] = {
    "max_tokens": 24, "temperature": 0.3, "seed": 5, "max_batch_size": 7, "dtype": "bfloat16", "device": "cuda:1",
    "models": ["tiny-llada", "tiny-dream"], "decoders": ["vanilla", "dparallel"],
    "decoder_settings": {"block_size": 16}, "pairs": [], "sweep": {"entropy_threshold": [0.1, 0.2]},
    "tasks": ["arith", "arith-long"], "split": "validation", "count": 3, "warmup": 2,
    "anchors": {"tiny-dream": "tiny-llada"},
}  # fmt: skip


def sample(problem_id: str) -> EvaluatedSample:
    return EvaluatedSample(problem_id, "#### 1", "1", "1", True, 6, 3, 4, "stop")


class Seen:
    """What stand-ins for models and measurements were asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: list[dict[str, Any]] = []
        self.measured: list[dict[str, Any]] = []
        self.devices: list[str] = []
        self.names = list(inspect.signature(evaluate).parameters)
        monkeypatch.setattr(verb, "check_device", self.devices.append)
        monkeypatch.setattr(verb, "plot_report", lambda *_: None)
        monkeypatch.setattr(verb, "evaluate", self.evaluate)
        monkeypatch.setattr(verb.DiffusionLLM, "from_pretrained", self.load)

    def load(self, name: str, **options: Any) -> str:
        self.loaded.append({"model": name, **options})
        return name

    def evaluate(self, *values: Any) -> EvaluationRow:
        asked = dict(zip(self.names, values, strict=False))
        self.measured.append(asked)
        labels = {name: asked[name] for name in ("max_tokens", "temperature", "seed", "warmup")}
        return summarise(
            [sample(problem.id) for problem in asked["problems"]], 2.0, model="family", decoder=asked["decoder"].name,
            task=asked["task"].name, settings=decoding_settings(asked["decoder"]), max_batch_size=1, **labels,
        )  # fmt: skip


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def keys(settings: EvaluateSettings) -> set[str]:
    return {path.name for path in (settings.output / "samples").iterdir()}


def test_every_setting_arrives(seen: Seen, tmp_path: Path) -> None:
    given = {**GIVEN, "output": tmp_path / "report"}
    assert given.keys() == EvaluateSettings.model_fields.keys()
    report = verb.run(build(EvaluateSettings, given), QUIET)
    assert seen.devices == ["cuda:1"]
    assert [(load["model"], load["dtype"], load["device"], load["max_batch_size"]) for load in seen.loaded] == [
        ("tiny-dream", "bfloat16", "cuda:1", 7),
        ("tiny-llada", "bfloat16", "cuda:1", 7),
    ]
    decoders = [decoder("vanilla", block_size=16)]
    decoders += [decoder("dparallel", block_size=16, entropy_threshold=value) for value in (0.1, 0.2)]
    expected = [
        (model, chosen.name, task, chosen)
        for model in ("tiny-llada", "tiny-dream") for chosen in decoders for task in ("arith", "arith-long")
    ]  # fmt: skip
    assert [(row.model, row.decoder, row.task) for row in report.rows] == [item[:3] for item in expected]
    found = [(asked["llm"], asked["decoder"].name, asked["task"].name, asked["decoder"]) for asked in seen.measured]
    assert sorted(found, key=str) == sorted(expected, key=str)
    for asked in seen.measured:
        assert (asked["max_tokens"], asked["temperature"], asked["seed"], asked["warmup"]) == (24, 0.3, 5, 2)
        assert asked["problems"] == load_task(asked["task"].name).problems("validation", 3)
        assert asked["progress"] is QUIET
    assert report.anchors == {"tiny-dream": "tiny-llada"}
    assert len(keys(build(EvaluateSettings, given))) == len(expected)
    assert len((tmp_path / "report" / "report.md").read_text().splitlines()) == 2 + len(expected)


def test_a_pair_has_its_own_model_decoder_settings_and_names(seen: Seen, tmp_path: Path) -> None:
    pair = {
        "model": "tiny-dream", "decoder": "d3llm", "decoder_settings": {"entropy_threshold": 0.7},
        "model_label": "one", "decoder_label": "fast",
    }  # fmt: skip
    assert pair.keys() == Pair.model_fields.keys()
    values = {"pairs": [pair], "decoder_settings": {"entropy_threshold": 0.1, "block_size": 16}, "count": 1}
    (row,) = verb.run(build(EvaluateSettings, {**values, "output": tmp_path}), QUIET).rows
    assert (row.model, row.decoder, seen.loaded[0]["model"]) == ("one", "fast", "tiny-dream")
    assert seen.measured[0]["decoder"] == decoder("d3llm", entropy_threshold=0.7, block_size=16)


CHANGES: dict[str, Any] = {
    "max_tokens": 25, "temperature": 0.4, "seed": 6, "max_batch_size": 8, "dtype": "float16", "device": "cuda:2",
    "decoder_settings": {"block_size": 8}, "split": "test", "count": 4, "warmup": 3, "decoders": ["d3llm"],
    "models": ["tiny-ar"], "tasks": ["arith-long"], "sweep": {"entropy_threshold": [0.4]},
}  # fmt: skip
SAME: dict[str, Any] = {"anchors": {}, "output": None, "pairs": []}  # of the report, not of what is measured


def test_whatever_a_figure_depends_on_makes_another_measurement(seen: Seen, tmp_path: Path) -> None:
    """Each setting changed alone, in one folder: nothing that is kept stands for another measurement."""
    base = {**GIVEN, "models": ["tiny-llada"], "decoders": ["dparallel"], "tasks": ["arith"], "anchors": {}}
    base |= {"sweep": {"entropy_threshold": [0.3]}}
    assert {*CHANGES, *SAME} == EvaluateSettings.model_fields.keys()
    settings = build(EvaluateSettings, {**base, "output": tmp_path})
    verb.run(settings, QUIET)
    for number, (name, value) in enumerate(CHANGES.items(), start=2):
        change = {name: value} | ({"decoders": ["autoregressive"], "decoder_settings": {}} if name == "models" else {})
        verb.run(build(EvaluateSettings, {**base, "output": tmp_path, **change}), QUIET)
        assert len(keys(settings)) == number, name
    measured = len(seen.measured)
    again = verb.run(settings, QUIET)
    assert len(seen.measured) == measured == 1 + len(CHANGES) and len(again.rows) == 1


def test_a_row_that_is_read_back_is_the_one_that_was_measured(seen: Seen, tmp_path: Path) -> None:
    settings = build(EvaluateSettings, {"decoders": ["d3llm"], "count": 2, "output": tmp_path})
    (row,) = verb.run(settings, QUIET).rows
    (again,) = verb.run(settings, QUIET).rows
    assert again == row and len(seen.measured) == 1
    assert again.samples == row.samples == tuple(sample(p.id) for p in load_task("arith").problems("test", 2))


# --- one measurement


class Recorder(DiffusionLLM):
    """Answers "#### 2" to everything, in 3 forwards; remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.engine = SimpleNamespace(decoder=decoder("d3llm"), max_batch_size=9)  # type: ignore[assignment]
        self.family = SimpleNamespace(name="family")  # type: ignore[assignment]
        self.model = SimpleNamespace(embed_tokens=SimpleNamespace(weight=torch.zeros(1)))  # type: ignore[assignment]

    def generate(self, prompts: Any, progress: Any = None, **options: Any) -> list[Output]:  # type: ignore[override]
        self.calls.append((list(prompts), {**options, "progress": progress}))
        return [Output("#### 2", [7] * 6, "length", 5, [1] * 5, 3, 2.0, [0], [0.0], [0.0], [7]) for _ in prompts]


def problems() -> Iterator[Problem]:
    for number in range(4):
        yield Problem(f"id-{number}", [{"role": "user", "content": str(number)}], str(number))


def test_every_argument_of_a_measurement_reaches_the_decoder_and_the_row() -> None:
    given: dict[str, Any] = {
        "llm": Recorder(), "task": load_task("arith"), "problems": list(problems()), "max_tokens": 24,
        "temperature": 0.3, "seed": 5, "progress": QUIET, "warmup": 2, "decoder": "dparallel",
    }  # fmt: skip
    assert [*given, "overrides"] == list(inspect.signature(evaluate).parameters)
    row = evaluate(**given, entropy_threshold=0.7)
    chosen = decoder("dparallel", entropy_threshold=0.7)
    options = {"max_tokens": 24, "temperature": 0.3, "seed": 5, "decoder": chosen}
    messages = [problem.messages for problem in problems()]
    assert given["llm"].calls == [
        (messages[:2], {**options, "progress": None}),
        (messages, {**options, "progress": QUIET}),
    ]
    expected = summarise(
        [
            EvaluatedSample(p.id, "#### 2", "2", p.reference or "", p.reference == "2", 6, 3, 5, "length")
            for p in problems()
        ],
        row.seconds,
        model="family", decoder="dparallel", task="arith", settings=decoding_settings(chosen), max_tokens=24,
        temperature=0.3, seed=5, warmup=2, max_batch_size=9,
    )  # fmt: skip
    assert row == expected and row.samples == expected.samples
    assert (row.correct, row.problems, row.tokens, row.forwards, row.tpf) == (1, 4, 24, 12, 2.0)
    assert row.tps == 24 / row.seconds and row.accuracy == 25.0
    assert replace(row, aup=1.0).to_dict()["aup"] == 1.0
