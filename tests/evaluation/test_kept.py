"""The verb's edge: settings arrive where they act, and a kept measurement is used for what it was made for only."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from d3llm_ray.config import build
from d3llm_ray.decoding import DiffusionLLM, decoder
from d3llm_ray.errors import IncompleteError
from d3llm_ray.evaluation import kept
from d3llm_ray.evaluation import run as verb
from d3llm_ray.evaluation.settings import EvaluateSettings, Pair
from d3llm_ray.tasks import Task, arith, load_task
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
    assert [name for name, value in defaults.items() if getattr(settings, name) == value] == [
        *("actors", "cpus_per_actor", "gpus_per_actor", "resource_timeout_s", "shard_size"),  # in test_spread
        *("api_key_file", "retries", "timeout_s", "pairs", "url", "concurrency"),  # in test_endpoint
    ]
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


Table = dict[str, list[Any]]
Damage = Callable[[dict[str, Any], Table], Any]


def _damaged(file: Path, damage: Damage) -> None:
    """Write a kept row anew with other values: of the row in its metadata, or of the table."""
    table = pq.read_table(file)
    row, columns = json.loads(table.schema.metadata[kept.ROW]), table.to_pydict()
    damage(row, columns)
    changed = pa.table(columns, schema=table.schema if columns.keys() == set(table.schema.names) else None)
    pq.write_table(changed.replace_schema_metadata({kept.ROW: json.dumps(row)}), file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"PAR1", b"PAR2"),
        lambda row, _: row.pop("tokens"),
        lambda row, _: row.update(colour="red"),
        lambda row, _: row.update(accuracy=12.5),
        lambda row, _: row.update(seconds=0),
        lambda _, table: table.pop("correct"),
        lambda _, table: table["problem_id"].__setitem__(1, "another"),
        lambda _, table: table["tokens"].__setitem__(1, None),
        lambda _, table: [column.pop() for column in table.values()],
        lambda _, table: [column.clear() for column in table.values()],
    ],
)
def test_a_torn_or_foreign_measurement_is_said_and_made_again(
    llm: FakeLLM, tiny_checkpoint: Path, tmp_path: Path, damage: Callable[..., Any]
) -> None:
    settings = EvaluateSettings(
        models=[str(tiny_checkpoint)], decoders=["d3llm"], count=2, warmup=0, output=tmp_path / "report"
    )
    first = verb.run(settings, Notes())
    (file,) = (settings.output / "samples").iterdir()
    if damage.__code__.co_argcount == 1:
        file.write_bytes(damage(file.read_bytes()))
    else:
        _damaged(file, damage)
    notes = Notes()
    again = verb.run(settings, notes)
    assert len(notes.said) == 2 and notes.said[0].startswith("measured again") and file.name in notes.said[0]
    assert len(llm.calls) == 2
    assert (again.rows[0].tokens, len(again.rows[0].samples)) == (first.rows[0].tokens, 2)
    silent = Notes()
    verb.run(settings, silent)
    assert len(llm.calls) == 2 and silent.said == []


def test_answers_of_an_earlier_versions_form_are_said_and_made_again(
    llm: FakeLLM, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    settings = EvaluateSettings(models=[str(tiny_checkpoint)], decoders=["d3llm"], count=2, output=tmp_path / "report")
    verb.run(settings, Notes())
    (file,) = (settings.output / "samples").iterdir()
    old = file.rename(file.with_suffix(".jsonl"))
    notes = Notes()
    verb.run(settings, notes)
    assert notes.said[0] == f"measured again, as {old} cannot be used: answers are kept as parquet now"
    assert file.is_file() and not old.exists()


def test_answers_open_in_what_people_read_tables_with(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Each column against the offline API, through pandas and datasets as docs/evaluation.md says."""
    settings = EvaluateSettings(
        models=[str(tiny_checkpoint)], decoders=["d3llm"], count=3, max_tokens=24, output=tmp_path / "report"
    )
    verb.run(settings, Notes())
    (file,) = (settings.output / "samples").iterdir()
    engine = DiffusionLLM.from_pretrained(tiny_checkpoint, "d3llm")
    problems = load_task("arith").problems("test", 3)
    outputs = engine.generate([each.messages for each in problems], max_tokens=24)
    assert engine.tokenizer is not None
    expected = {
        "problem_id": [each.id for each in problems],
        "user_id": [None] * 3,
        "prompt": [engine.tokenizer.decode(output.prompt_ids) for output in outputs],
        "text": [output.text for output in outputs],
        "token_ids": [output.token_ids for output in outputs],
        "reference": [each.reference for each in problems],
        "correct": [False] * 3,
        "tokens": [len(output.token_ids) for output in outputs],
        "forwards": [output.forwards for output in outputs],
        "prompt_tokens": [len(output.prompt_ids) for output in outputs],
        "finish_reason": [output.finish_reason for output in outputs],
        "error": [None] * 3,
    }
    frame = pytest.importorskip("pandas").read_parquet(file)
    assert set(frame.columns) == {*expected, "answer"}
    assert [list(ids) for ids in frame["token_ids"]] == expected["token_ids"]
    assert list(frame["text"]) == expected["text"] and frame["correct"].dtype == bool
    datasets = pytest.importorskip("datasets")
    read = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    assert {name: read[name][:] for name in expected} == expected
    assert {pq.ParquetFile(file).metadata.row_group(0).column(number).compression for number in range(13)} == {"ZSTD"}


def test_the_first_prompt_is_said_before_anything_is_decoded_and_kept(
    llm: FakeLLM, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for a task, however many decoders, and models that read it alike: the template's own text, special tokens by
    their names."""
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    settings = EvaluateSettings(
        models=[str(tiny_checkpoint), str(other)], decoders=["d3llm", "vanilla"], tasks=["arith", "arith-long"],
        count=2, output=tmp_path / "report",
    )  # fmt: skip
    notes = Notes()
    monkeypatch.setattr(llm, "generate", lambda *_, **__: pytest.fail(f"decoded: {len(notes.said)} prompts said"))
    with pytest.raises(pytest.fail.Exception, match="2 prompts said"):
        verb.run(settings, notes)
    tokenizer, names = AutoTokenizer.from_pretrained(tiny_checkpoint), ["other", "tiny-random"]
    for said, name in zip(notes.said, settings.tasks, strict=True):
        (problem_,) = load_task(name).problems("test", 1)
        whole = tokenizer.apply_chat_template(problem_.messages, tokenize=False, add_generation_prompt=True)
        heading, read = said.split("\n", 1)
        of, for_models = heading.removesuffix(", as the model reads it:").split(" for ")
        assert (of, sorted(for_models.split(", "))) == (f"the first prompt of {name}", names)
        assert "".join(read.split()) == "".join(whole.split())  # the tokenizer of words does not keep where spaces are
        assert whole.startswith("<|startoftext|><|start_header_id|>user<|end_header_id|>")
        for model in names:
            (file,) = (settings.output / "prompts").glob(f"{model}-{name}-??????????.txt")
            assert file.read_text() == read


def test_a_first_prompt_that_the_model_refuses_is_said(llm: FakeLLM, tiny_checkpoint: Path, tmp_path: Path) -> None:
    notes, file = Notes(), task_file(tmp_path, prompt="cut \ud83d")
    settings = EvaluateSettings(
        models=[str(tiny_checkpoint)], decoders=["d3llm"], tasks=[str(file)], output=tmp_path / "r"
    )
    verb.run(settings, notes)
    assert "(refused: messages.0: got half of a surrogate pair" in notes.said[0]


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
    shown = (settings.output / "report.md").read_text().splitlines()
    assert shown[0] == "| model | decoder | accuracy | errors | TPF | TPS | AUP |"
    assert shown[2].startswith("| tiny-random | d3llm | 50.0 % (15.0 - 85.0) | 2 | 2.00 |")
    (samples,) = (settings.output / "samples").iterdir()
    table = pq.read_table(samples).to_pydict()
    assert table["user_id"] == ["x", "7", None, "\\ud83d"]
    assert table["error"] == [None, "the reason", "another", None]
    assert table["correct"] == [True, False, False, True]
    row = kept.read_row(samples, table["problem_id"])
    assert not isinstance(row, str) and [sample.user_id for sample in row.samples] == ["x", 7, None, "\ud83d"]
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
