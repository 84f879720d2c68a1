"""Rows of the published benchmarks: from a folder of JSONL files, or from the Hub by `datasets`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3llm_ray.errors import InputError, one_line, unknown
from d3llm_ray.paths import expanded, not_uploaded

Row = dict[str, Any]
Folder = str | os.PathLike[str] | None
VARIABLE = "D3LLM_RAY_DATA"
HELD_OUT = 16  # of 256: GSM8K's training questions that are held out for tuning
HUB_TIMEOUT_S = 3.0


def is_held_out(question: str) -> bool:
    """Whether a training question belongs to the validation split: by its text alone, one in sixteen."""
    return hashlib.sha256(question.encode()).digest()[0] < HELD_OUT


@dataclass(frozen=True)
class Part:
    """One split: the local file and the Hub's split that hold it, and which of their rows are of it."""

    file: str
    hub_split: str
    keep: Callable[[Row], bool] = lambda _row: True


@dataclass(frozen=True)
class PublishedData:
    """One benchmark's rows. `hub`: its name at the Hub and configuration; `columns`: what every row must have."""

    hub: tuple[str, str | None]
    columns: Mapping[str, type]
    parts: Mapping[str, Part]

    def rows(self, part: str, folder: Folder) -> list[Row]:
        """The rows of one split, in the order of the file.

        `folder` None is the one that `D3LLM_RAY_DATA` names; without either they come from the Hub. `InputError` for a
        split that the benchmark does not have, a file that is not there or not as expected, or a failed download.
        """
        if part not in self.parts:
            raise unknown(f"split of {self.hub[0]}", part, self.parts)
        chosen, place = self.parts[part], os.environ.get(VARIABLE) if folder is None else folder
        if place:
            name = str(Path(expanded(place, "data_dir")) / chosen.file)
            found = _read_jsonl(name, self.hub[0])
        else:
            name = f"{self.hub[0]} ({chosen.hub_split})"
            found = _download(self.hub, chosen)
        for number, row in enumerate(found, start=1):
            self._check(row, f"data_dir: row {number} of {name!r}")
        rows = [row for row in found if chosen.keep(row)]
        if not rows:
            raise InputError(f"data_dir: {name!r} has no rows of the {part} split; accepted: the whole benchmark")
        return rows

    def _check(self, row: Any, where: str) -> None:
        if not isinstance(row, dict):
            raise InputError(f"{where} is {type(row).__name__}; accepted: an object with {', '.join(self.columns)}")
        for column, kind in self.columns.items():
            if not isinstance(row.get(column), kind):
                got = type(row[column]).__name__ if column in row else "missing"
                raise InputError(f"{where}: column {column!r} is {got}; accepted: {kind.__name__}")


def _read_jsonl(name: str, hub: str) -> list[Any]:
    try:
        lines = Path(name).read_text(encoding="utf-8").split("\n")  # splitlines also splits within JSON's strings
    except (OSError, UnicodeDecodeError) as error:
        accepted = f"a folder with {Path(name).name!r}, or none to get {hub} from the Hub"
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"data_dir: cannot read {name!r}: {why}; accepted: {accepted}{not_uploaded(name)}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise InputError(f"data_dir: line {number} of {name!r} is not JSON: {error}") from error
    return rows


def _download(hub: tuple[str, str | None], part: Part) -> list[Any]:
    """The rows from the Hub, or from what `datasets` keeps of it, as always where the Hub cannot be reached."""
    path, configuration = hub
    accepted = f"--data-dir or {VARIABLE}: a folder with {part.file!r}; or a connection to the Hub"
    missing = f"data_dir: {path} ({part.hub_split}) must be downloaded from the Hub"
    try:
        import datasets  # 0.9 s
        from huggingface_hub import constants
    except ImportError as error:
        raise InputError(f"{missing} by the package datasets, which is not installed; accepted: {accepted}") from error
    told = constants.HF_HUB_OFFLINE
    offline = told or not _reachable(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = offline  # else it is asked again and again, for 20 s and more
    try:
        loaded = datasets.load_dataset(path, configuration, split=part.hub_split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = "which cannot be reached" if offline else one_line(error)
        raise InputError(f"{missing}, {why}; accepted: {accepted}") from error
    finally:
        constants.HF_HUB_OFFLINE = told
    return list(loaded)


def _reachable(endpoint: str) -> bool:
    """Whether anybody answers at the Hub's address, asked once and in a few seconds."""
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
    except HTTPError:
        return True  # an answer
    except (URLError, OSError):
        return False
    return True


def _numbered(low: int, high: int) -> Callable[[Row], bool]:
    """MBPP's splits are ranges of `task_id`, both ends included."""
    return lambda row: low <= row["task_id"] <= high


_TEXTS = ("question", "answer")
GSM8K = PublishedData(
    ("openai/gsm8k", "main"),
    dict.fromkeys(_TEXTS, str),
    {
        "test": Part("gsm8k_test.jsonl", "test"),
        "train": Part("gsm8k_train.jsonl", "train", lambda row: not is_held_out(row["question"])),
        "validation": Part("gsm8k_train.jsonl", "train", lambda row: is_held_out(row["question"])),
        "examples": Part("gsm8k_train.jsonl", "train"),
    },
)
MATH500 = PublishedData(
    ("HuggingFaceH4/MATH-500", None),
    dict.fromkeys(("problem", "answer"), str),
    {"test": Part("math500.jsonl", "test")},
)
HUMANEVAL = PublishedData(
    ("openai/openai_humaneval", None),
    dict.fromkeys(("task_id", "prompt", "entry_point", "test"), str),
    {"test": Part("humaneval.jsonl", "test")},
)
MBPP = PublishedData(
    ("google-research-datasets/mbpp", "full"),
    {"task_id": int, "text": str, "code": str, "test_setup_code": str, "test_list": list},
    {
        "test": Part("mbpp.jsonl", "test", _numbered(11, 510)),
        "validation": Part("mbpp.jsonl", "validation", _numbered(511, 600)),
        "train": Part("mbpp.jsonl", "train", _numbered(601, 974)),
        "examples": Part("mbpp.jsonl", "prompt", _numbered(2, 4)),
    },
)
