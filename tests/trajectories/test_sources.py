"""Streamed prompts of every kind of source."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d3llm_ray.errors import InputError
from d3llm_ray.tasks import EMBEDDED, load_task
from d3llm_ray.trajectories.sources import Source, open_source


def contents(source: Source) -> list[str]:
    return [problem.messages[-1]["content"] for problem in source.problems()]


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"prompt": text}) + "\n" for text in texts).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three prompts files of three formats, with what else may lie beside them."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines("three", "four")))
    (folder / "a.jsonl").write_bytes(lines("one", "two"))
    pq.write_table(pa.table({"question": ["five"], "answer": ["#### 5"]}), folder / "c.parquet")
    (folder / "README.md").write_text("about")
    (folder / "_partial.d.jsonl").write_text("{")
    (folder / ".e.jsonl").write_text("{")
    (folder / "deeper").mkdir()
    return folder


def snapshot(folder: Path, where: str = "data") -> Path:
    """A dataset of the Hub as it is downloaded: two splits of Parquet, and what lies beside them."""
    (folder / where).mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("about")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs")
    for name, text in (("test-00000-of-00001", "t"), ("train-00000-of-00002", "0"), ("train-00001-of-00002", "1")):
        pq.write_table(pa.table({"question": [text]}), folder / where / f"{name}.parquet")
    return folder


@pytest.mark.parametrize("layout", ["data", "beside", "cache", "cache of two", "folder a split", "legacy names"])
def test_a_downloaded_dataset_is_read_a_split_at_a_time(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    if layout.startswith("cache"):
        snapshot(folder / "snapshots" / ("0a" * 20))
        if layout == "cache of two":
            (folder / "snapshots" / ("0b" * 20)).mkdir()
            (folder / "refs").mkdir()
            (folder / "refs" / "main").write_text("0a" * 20)
    elif layout == "folder a split":
        for split, texts in (("train", ["0", "1"]), ("test", ["t"])):
            (folder / split).mkdir(parents=True)
            pq.write_table(pa.table({"question": texts}), folder / split / "rows.parquet")
    else:
        snapshot(folder, "." if layout == "beside" else "data")
    if layout == "legacy names":
        for file in (folder / "data").iterdir():
            file.rename(file.with_name(f"{file.stem}-a09b74b3ef9c3b56.parquet"))
    source = open_source(str(folder), [], "train", None)
    assert source.total == 2 and contents(source) == ["0", "1"]
    assert contents(open_source(folder.as_uri(), [], "test", None)) == ["t"]
    with pytest.raises(InputError) as caught:
        open_source(str(folder), [], "validation", None)
    if layout == "folder a split":
        assert "itself, but in its folders 'test', 'train'" in str(caught.value)
    else:
        assert "unknown value 'validation'; accepted: test, train" in str(caught.value)


def test_folders_without_splits_are_read_whole(tmp_path: Path) -> None:
    for name in ("part-00000-of-00002", "part-00001-of-00002"):
        pq.write_table(pa.table({"question": [name]}), tmp_path / f"{name}.parquet")
    assert len(contents(open_source(str(tmp_path), [], "test", None))) == 2
    for name in ("one-00000-of-00001", "two-00000-of-00001"):
        (tmp_path / "two").mkdir(exist_ok=True)
        pq.write_table(pa.table({"question": [name]}), tmp_path / "two" / f"{name}.parquet")
    with pytest.raises(InputError, match="unknown value 'train'; accepted: one, two"):
        open_source(str(tmp_path / "two"), [], "train", None)


def test_what_is_no_dataset_is_said_to_be_what_it_is(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            open_source(str(path), [], "train", None)
        return str(caught.value)

    (tmp_path / "hub" / "datasets--openai--gsm8k").mkdir(parents=True)
    assert "a cache of the Hugging Face Hub with datasets such as 'datasets--openai--gsm8k'" in refusal(
        tmp_path / "hub"
    )
    for name in ("main", "socratic"):
        snapshot(tmp_path / "configs" / name, ".")
    assert "itself, but in its folders 'main', 'socratic'" in refusal(tmp_path / "configs")
    for name in ("1", "2"):
        snapshot(tmp_path / "cache" / "snapshots" / name)
    assert "has the snapshots 1, 2; accepted: one of them" in refusal(tmp_path / "cache")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "rows.parquet").symlink_to(tmp_path / "blob")
    assert "'rows.parquet' is a broken symbolic link" in refusal(tmp_path / "gone")
    assert "is a broken symbolic link to" in refusal(tmp_path / "gone" / "rows.parquet")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "lfs").mkdir()
    (tmp_path / "lfs" / "rows.parquet").write_text(pointer)
    for path in (tmp_path / "lfs", tmp_path / "lfs" / "rows.parquet"):
        assert refusal(path).startswith("prompts: ") and "rows.parquet is a Git LFS pointer" in refusal(path)


def test_texts() -> None:
    source = open_source("arith", ["hello", "you"], "train", None)
    assert (source.total, contents(source)) == (2, ["hello", "you"])
    assert contents(open_source("arith", ["hello", "you"], "train", 1)) == ["hello"]


def test_embedded_tasks() -> None:
    source = open_source("arith", [], "train", None)
    assert (source.name, source.total) == ("arith", 2000)
    assert list(source.problems()) == load_task("arith").problems("train", 2000) == list(source.problems())
    test = open_source("arith-long", [], "test", 30)
    assert test.total == 30 and list(test.problems()) == load_task("arith-long").problems("test", 30)


def test_embedded_problems_are_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def load(split: str, count: int, make: Any = EMBEDDED["arith"].load) -> Iterator[Any]:
        for problem in make(split, count):
            made.append(problem)
            yield problem

    monkeypatch.setitem(EMBEDDED, "arith", type(EMBEDDED["arith"])("arith", load))
    source = open_source("arith", [], "train", 1_000_000)
    assert source.total == 1_000_000
    made.clear()
    list(islice(source.problems(), 3))
    assert len(made) == 3


def test_the_task_judges_and_carries_no_problems(folder: Path) -> None:
    for prompts in ("arith", str(folder), str(folder / "b.jsonl.gz")):
        task = pickle.loads(pickle.dumps(open_source(prompts, [], "train", None).task))
        assert task.is_correct("#### 42", "42") and task.problems() == []
    assert task.name == "b"


def test_a_folder_is_its_files_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ["one", "two", "three", "four", "five"]
    monkeypatch.chdir(folder.parent)
    for prompts in (str(folder), f"{folder}/", folder.as_uri(), "prompts", "./prompts"):
        source = open_source(prompts, [], "train", None)
        assert (source.name, source.total) == (prompts, None)
        assert contents(source) == expected == contents(source)
        assert [problem.reference for problem in source.problems()] == [None] * 4 + ["#### 5"]
    assert contents(open_source(str(folder), [], "test", 3)) == expected[:3]


def test_the_rows_of_parquet_are_counted_without_reading_them(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [str(n) for n in range(700)]}), tmp_path / "1.parquet", row_group_size=100)
    pq.write_table(pa.table({"question": ["700"]}), tmp_path / "2.parquet")
    source = open_source(tmp_path.as_uri(), [], "train", None)
    assert source.total == 701 and contents(source) == [str(n) for n in range(701)]
    assert [open_source(str(tmp_path), [], "train", count).total for count in (650, 9000)] == [650, 701]


def test_a_file_is_not_read_to_its_end_for_its_first_rows(tmp_path: Path) -> None:
    """The end is missing: whoever reads that far fails."""
    file = tmp_path / "long.jsonl.gz"
    file.write_bytes(gzip.compress(lines(*(str(n).zfill(1000) for n in range(3000))))[:-12])
    problems = open_source(str(file), [], "train", None).problems()
    assert [int(next(problems).messages[0]["content"]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="cannot read .*long.jsonl.gz"):
        list(problems)


def test_a_bad_row_further_on_is_named_where_it_comes(folder: Path) -> None:
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines("three") + b'{"text": "four"}\n'))
    problems = open_source(str(folder), [], "train", None).problems()
    assert len(list(islice(problems, 3))) == 3
    with pytest.raises(InputError) as caught:
        next(problems)
    assert str(caught.value) == (
        f"prompts: line 2 of '{folder}/b.jsonl.gz' has the columns 'text'; "
        "accepted: exactly one of 'messages', 'prompt' and 'question'"
    )


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("nothing", "prompts: unknown value 'nothing'; accepted: a .jsonl, .jsonl.gz or .parquet file or a folder"),
        ("missing.jsonl", "prompts: cannot read 'missing.jsonl': no such file or folder"),
        ("some/where/missing", "prompts: unknown value 'some/where/missing'"),
        ("data/missing.parquet", "prompts: cannot read 'data/missing.parquet': no such file or folder"),
        ("file:///missing", "prompts: cannot read 'file:///missing': no such file or folder"),
        ("nowhere://x", "prompts: cannot open 'nowhere://x'"),
        (
            "{tmp}/empty",
            "prompts: no data files in '{tmp}/empty'; accepted: a folder with .jsonl, .jsonl.gz, .parquet files",
        ),
        ("{tmp}/empty.jsonl", "has no rows"),
        ("{tmp}/rows.csv", "accepted: a .jsonl, .jsonl.gz or .parquet file"),
        ("{tmp}/column.jsonl", "line 1 of '{tmp}/column.jsonl' has the columns 'text'; accepted: exactly one of"),
        ("{tmp}/broken.parquet", "cannot read '{tmp}/broken.parquet'"),
        ("{tmp}/column.parquet", "row 1 of '{tmp}/column.parquet' has the columns 'text'"),
        ("{tmp}/none.parquet", "has no rows"),
    ],
)
def test_bad_sources_are_refused_in_one_line(tmp_path: Path, prompts: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "rows.csv").write_text("prompt\na\n")
    (tmp_path / "column.jsonl").write_text('{"text": "?"}\n')
    (tmp_path / "broken.parquet").write_text("PAR")
    pq.write_table(pa.table({"text": ["?"]}), tmp_path / "column.parquet")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(InputError) as caught:
        open_source(prompts.format(tmp=tmp_path), [], "train", None)
    assert message.format(tmp=tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A Hub with one dataset, in the types that `datasets` streams; gives what was asked of it."""
    asked: list[tuple[Any, ...]] = []
    rows = [{"question": f"{n}?", "answer": f"#### {n}", "extra": n} for n in range(5)] + [{"question": None}]

    def load_dataset(path: str, name: str | None, *, streaming: bool) -> datasets.IterableDatasetDict:
        asked.append((path, name))
        assert streaming
        return datasets.IterableDatasetDict({"test": datasets.Dataset.from_list(rows).to_iterable_dataset()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_dataset_of_the_hub(hub: list[tuple[Any, ...]]) -> None:
    source = open_source("openai/gsm8k:main", [], "test", 5)
    assert hub == [("openai/gsm8k", "main")] and source.name == "openai/gsm8k:main"
    assert contents(source) == ["0?", "1?", "2?", "3?", "4?"] == contents(source)
    assert [problem.reference for problem in source.problems()][:2] == ["#### 0", "#### 1"]
    open_source("owner/name", [], "test", None)
    assert hub[1:] == [("owner/name", None)]
    with pytest.raises(InputError, match="row 6 of 'owner/name' has .* exactly one of"):
        list(open_source("owner/name", [], "test", None).problems())
    with pytest.raises(InputError, match="split of 'owner/name': unknown value 'train'; accepted: test"):
        open_source("owner/name", [], "train", None)


def test_a_local_path_wins_over_a_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: list[tuple[Any, ...]]
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.jsonl").write_bytes(lines("local"))
    monkeypatch.chdir(tmp_path)
    assert contents(open_source("owner/name", [], "train", None)) == ["local"] and not hub


def test_the_rows_of_a_dataset_are_known_from_its_description(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "a"}]).to_iterable_dataset()
    rows.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=70)})
    hub = datasets.IterableDatasetDict({"train": rows})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    assert [open_source("owner/name", [], "train", count).total for count in (None, 30, 90)] == [70, 30, 70]


def test_a_dataset_out_of_reach_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as caught:
        open_source("nobody/nothing", [], "train", None)
    assert str(caught.value).startswith("prompts: cannot read 'nobody/nothing': no such path, and as a dataset")
    assert "\n" not in str(caught.value)
