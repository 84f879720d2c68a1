"""The verb's edge: settings arrive where they act, and a kept measurement is used for what it was made for only."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d3llm_ray.config import build
from d3llm_ray.decoding import decoder
from d3llm_ray.errors import IncompleteError
from d3llm_ray.evaluation import kept
from d3llm_ray.evaluation import run as verb
from d3llm_ray.evaluation.settings import EvaluateSettings, Pair
from d3llm_ray.tasks import Task, arith
from tests.evaluation.fakes import FakeLLM, problem
from tests.wiring import Notes

QUESTION = "Tom has 5 apples. How many apples does Tom have now?"


class EveryAnswer(dict[str, Any]):
    """The same answer to all prompts."""

    def __missing__(self, prompt: str) -> tuple[str, int, int]:
        return ("#### 5", 4, 2)


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    """Stands for every model; `loads` has what was asked for."""
    fake = FakeLLM(EveryAnswer())
    fake.loads = []

    def load(*words: Any, **named: Any) -> FakeLLM:
        fake.loads.append((words, named))
        return fake

    monkeypatch.setattr(verb.DiffusionLLM, "from_pretrained", load)
    monkeypatch.setattr(verb, "can_plot", lambda *_: False)  # a picture takes longer than all else here
    return fake


def task_file(folder: Path, **row: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text(json.dumps({"prompt": QUESTION, "reference": "5", "id": "q1"} | row) + "\n")
    return folder / "test.jsonl"


def test_every_setting_arrives_where_it_acts(
    llm: FakeLLM, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(split: str, count: int) -> list[Any]:
        asked.append((split, count))
        return [problem(f"{split} {number}", "5") for number in range(count)]

    monkeypatch.setattr(verb, "load_task", lambda *words: asked.append(words) or Task("own", load))
    monkeypatch.setattr(verb, "check_device", asked.append)
    settings = EvaluateSettings(
        models=[str(tiny_checkpoint)],
        decoders=["d3llm"],
        decoder_settings={"refresh_interval": 7},
        sweep={"entropy_threshold": [0.31, 0.57]},
        tasks=["task of its own"],
        split="validation",
        count=3,
        warmup=2,
        anchors={"tiny-random": "tiny-random"},
        max_tokens=48,
        temperature=0.7,
        top_p=0.6,
        data_dir=tmp_path / "data",
        seed=11,
        max_batch_size=5,
        dtype="bfloat16",
        device="cuda:3",
        output=tmp_path / "report",
    )
    defaults = {name: field.get_default() for name, field in EvaluateSettings.model_fields.items()}
    assert [name for name, value in defaults.items() if getattr(settings, name) == value] == ["pairs"]
    report = verb.run(settings, Notes())
    assert asked == ["cuda:3", ("task of its own", tmp_path / "data"), ("validation", 3)]
    decoders = [decoder("d3llm", refresh_interval=7, entropy_threshold=value) for value in (0.31, 0.57)]
    engine = {"dtype": "bfloat16", "device": "cuda:3", "max_batch_size": 5}
    assert llm.loads == [((str(tiny_checkpoint),), {"decoder": decoders[0], **engine})]
    options = {"max_tokens": 48, "temperature": 0.7, "top_p": 0.6, "seed": 11, "errors": "return", "stop": ()}
    assert llm.calls == [(number, options | {"decoder": each}) for each in decoders for number in (2, 3)]
    assert report.anchors == {"tiny-random": "tiny-random"}
    assert [
        (row.problems, row.warmup, row.max_tokens, row.temperature, row.top_p, row.seed) for row in report.rows
    ] == [(3, 2, 48, 0.7, 0.6, 11)] * 2
    assert {path.name for path in settings.output.iterdir()} >= {"evaluate.yaml", "report.json", "samples"}


def test_every_setting_of_a_pair_arrives(llm: FakeLLM, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pair = Pair(
        model=str(tiny_checkpoint),
        decoder="dparallel",
        decoder_settings={"entropy_threshold": 0.9},
        model_label="a model",
        decoder_label="a decoder",
    )
    settings = EvaluateSettings(pairs=[pair], tasks=[str(task_file(tmp_path))], output=tmp_path / "report", warmup=0)
    (row,) = verb.run(settings, Notes()).rows
    assert (row.model, row.decoder) == ("a model", "a decoder")
    assert llm.loads[0][0] == (str(tiny_checkpoint),)
    assert llm.calls[0][1]["decoder"] == decoder("dparallel", entropy_threshold=0.9)


def test_a_measurement_is_kept_for_what_it_was_made_for_only(
    llm: FakeLLM, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = tmp_path / "student", task_file(tmp_path / "task")
    shutil.copytree(tiny_checkpoint, model)
    base: dict[str, Any] = {
        "models": [str(model)],
        "decoders": ["d3llm"],
        "tasks": [str(file)],
        "count": 3,
        "output": tmp_path / "report",
    }

    def measures(change: dict[str, Any] | None = None) -> bool:
        """Whether the verb decodes anything."""
        before = len(llm.calls)
        verb.run(build(EvaluateSettings, base | (change or {})), Notes())
        return len(llm.calls) > before

    assert measures() and not measures()
    monkeypatch.setattr(verb, "check_device", lambda _name: None)
    embedded = {"tasks": ["arith"]}
    for change in (
        {"max_tokens": 32},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"seed": 1},
        {"max_batch_size": 2},
        {"dtype": "bfloat16"},
        {"device": "cuda"},
        {"warmup": 0},
        {"decoder_settings": {"entropy_threshold": 0.3}},
        {"decoders": ["vanilla"]},
        embedded,
        embedded | {"count": 4},
        embedded | {"split": "validation"},
        {"tasks": ["arith-long"]},
        {"pairs": [{"model": str(model), "decoder": "d3llm", "model_label": "another"}]},
    ):
        assert measures(change), change
        assert not measures(change), change
    # The same names, and other content.
    for row in ({"reference": "6"}, {"id": "q2"}, {"prompt": QUESTION + "!"}):
        task_file(tmp_path / "task", **row)
        assert measures(), row
    task_file(tmp_path / "task")
    assert not measures()
    twin = tmp_path / "elsewhere" / "student"  # as a tarball may unpack it: times are whole seconds, or all equal
    shutil.copytree(model, twin)
    assert measures({"models": [str(twin)]})
    monkeypatch.setattr(arith, "QUESTION", "How many {items}?")  # the embedded task of another version
    assert measures(embedded)
    monkeypatch.setattr(kept, "versions", lambda: {"d3llm-ray": "another"})
    assert measures()
    monkeypatch.setattr(kept, "machine", lambda: {"processor": "another", "platform": "a kernel"})
    assert measures()
    monkeypatch.setattr(kept, "machine", lambda: {"processor": "another", "platform": "its update"})
    assert not measures()
    os.utime(model / "model.safetensors", ns=(0, 0))
    assert measures()


def _line(number: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[list[str]], list[str]]:
    """Change one line's values."""

    def changed(lines: list[str]) -> list[str]:
        values = json.loads(lines[number])
        change(values)
        return [*lines[:number], json.dumps(values), *lines[number + 1 :]]

    return changed


@pytest.mark.parametrize(
    "damage",
    [
        lambda _lines: [],
        lambda lines: lines[:1],
        lambda lines: [*lines[:-1], lines[-1][:20]],
        lambda lines: lines[1:],
        lambda _lines: ["[]", "7"],
        lambda _lines: ["\udcff"],
        _line(0, lambda row: row.pop("tokens")),
        _line(0, lambda row: row.update(colour="red")),
        _line(0, lambda row: row.update(accuracy=12.5)),
        _line(0, lambda row: row.update(seconds=0)),
        _line(1, lambda sample: sample.pop("correct")),
        _line(1, lambda sample: sample.update(problem_id="another")),
        _line(1, lambda sample: sample.update(tokens="four")),
    ],
)
def test_a_torn_or_foreign_measurement_is_said_and_made_again(
    llm: FakeLLM, tiny_checkpoint: Path, tmp_path: Path, damage: Callable[[list[str]], list[str]]
) -> None:
    settings = EvaluateSettings(
        models=[str(tiny_checkpoint)], decoders=["d3llm"], count=2, warmup=0, output=tmp_path / "report"
    )
    first = verb.run(settings, Notes())
    (file,) = (settings.output / "samples").iterdir()
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_bytes("\n".join(damage(lines)).encode("utf-8", "surrogateescape"))
    notes = Notes()
    again = verb.run(settings, notes)
    assert len(notes.said) == 1 and notes.said[0].startswith("measured again") and file.name in notes.said[0]
    assert len(llm.calls) == 2
    assert (again.rows[0].tokens, len(again.rows[0].samples)) == (first.rows[0].tokens, 2)
    silent = Notes()
    verb.run(settings, silent)
    assert len(llm.calls) == 2 and silent.said == []


@pytest.mark.parametrize("same", [False, True])
def test_tasks_of_one_file_name_are_told_apart(llm: FakeLLM, tiny_checkpoint: Path, tmp_path: Path, same: bool) -> None:
    easy, hard = task_file(tmp_path / "a"), task_file(tmp_path / "b", **({} if same else {"reference": "6"}))
    settings = EvaluateSettings(
        models=[str(tiny_checkpoint)],
        decoders=["vanilla", "d3llm"],
        tasks=[str(easy), str(hard), str(easy.parent / ".." / "a" / "test.jsonl")],  # the last is the first again
        output=tmp_path / "report",
    )
    report = verb.run(settings, Notes())
    first, second = (row.task for row in report.rows[:2])
    assert first != second and [row.task for row in report.rows] == [first, second] * 2
    assert not same or (first, second) == (str(easy), str(hard))
    assert [row.accuracy for row in report.rows] == [100.0, 100.0 if same else 0.0] * 2
    assert [row.aup is None for row in report.rows] == [False, not same] * 2  # each with the best of its own task
    assert len(list((settings.output / "samples").iterdir())) == 4
    table = report.to_markdown()
    assert f" {first} |" in table and f" {second} |" in table
    alone = verb.run(settings.model_copy(update={"tasks": [str(easy)]}), Notes())
    assert all(row.task.startswith("test") for row in alone.rows) and len(llm.calls) == 8  # kept, under a short name


def test_a_file_named_as_an_embedded_task_is_another_task(llm: FakeLLM, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = task_file(tmp_path).rename(tmp_path / "arith.jsonl")
    settings = EvaluateSettings(
        models=[str(tiny_checkpoint)], decoders=["d3llm"], tasks=["arith", str(file)], count=2, output=tmp_path / "r"
    )
    first, second = (row.task for row in verb.run(settings, Notes()).rows)
    assert first == "arith" != second


def test_settings_files_of_one_name_are_told_apart(llm: FakeLLM, tiny_checkpoint: Path, tmp_path: Path) -> None:
    files = [tmp_path / name / "tuned.yaml" for name in ("a", "b")]
    for file, threshold in zip(files, (0.3, 0.6), strict=True):
        file.parent.mkdir()
        file.write_text(f"decoder: d3llm\nentropy_threshold: {threshold}\n")
    settings = EvaluateSettings(
        models=[str(tiny_checkpoint)], decoders=[str(file) for file in files], count=2, output=tmp_path / "report"
    )
    assert [row.decoder for row in verb.run(settings, Notes()).rows] == [f"d3llm ({file})" for file in files]


def test_long_labels_make_file_names_that_a_disk_takes(llm: FakeLLM, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pairs = [
        Pair(model=str(tiny_checkpoint), decoder="d3llm", model_label="m", decoder_label="\u00e9" * 300 + end)
        for end in "ab"
    ]
    settings = EvaluateSettings(pairs=pairs, count=2, output=tmp_path / "report")
    verb.run(settings, Notes())
    assert len(list((settings.output / "samples").iterdir())) == 2


def test_a_problem_without_an_answer_counts_as_wrong_and_is_named(
    llm: FakeLLM, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": text, "reference": "5", "id": name}
        for text, name in (("a", "x"), ("b", 7), ("c", None), ("d", "\ud83d"))
    ]
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    llm.answers = {"a": ("#### 5", 6, 2), "b": "the reason", "c": "another", "d": ("#### 5", 2, 2)}
    settings = EvaluateSettings(
        models=[str(tiny_checkpoint)], decoders=["d3llm"], tasks=[str(file)], warmup=2, output=tmp_path / "report"
    )
    for _ in range(2):  # measured, and read back
        with pytest.raises(IncompleteError) as caught:
            verb.run(settings, Notes())
        line = str(caught.value)
        assert "answers are missing: 2, counted as wrong" in line
        assert re.search(r"tiny-random, d3llm, test[^,]*, problem 2 \(7\): the reason; ", line), line
        assert "problem 3: another" in line and "\n" not in line
    assert verb.run(settings, Notes(), "return").rows[0].errors == 2
    (row,) = json.loads((settings.output / "report.json").read_text())["rows"]
    assert (row["problems"], row["correct"], row["errors"], row["accuracy"]) == (4, 2, 2, 50.0)
    assert (row["tokens"], row["forwards"], row["tpf"]) == (8, 4, 2.0)  # of the answers that there are
    table = (settings.output / "report.md").read_text().splitlines()
    assert table[0] == "| model | decoder | accuracy | errors | TPF | TPS | AUP |"
    assert table[2].startswith("| tiny-random | d3llm | 50.0 % (15.0 - 85.0) | 2 | 2.00 |")
    (samples,) = (settings.output / "samples").iterdir()
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()[1:]]
    assert [line["user_id"] for line in lines] == ["x", 7, None, "\ud83d"]
    assert [line["error"] for line in lines] == [None, "the reason", "another", None]
    assert [line["correct"] for line in lines] == [True, False, False, True]
    assert len(llm.calls) == 2


def test_a_row_without_a_single_answer_is_a_row(llm: FakeLLM, tiny_checkpoint: Path, tmp_path: Path) -> None:
    llm.answers = {QUESTION: "too long"}
    settings = EvaluateSettings(
        models=[str(tiny_checkpoint)], decoders=["d3llm"], tasks=[str(task_file(tmp_path))], output=tmp_path / "report"
    )
    with pytest.raises(IncompleteError, match=r"problem 1 \('q1'\): too long"):
        verb.run(settings, Notes())
    (row,) = json.loads((settings.output / "report.json").read_text())["rows"]
    assert (row["accuracy"], row["tpf"], row["tps"], row["aup"], row["errors"]) == (0.0, 0.0, 0.0, None, 1)
