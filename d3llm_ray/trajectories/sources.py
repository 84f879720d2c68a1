"""Where prompts come from, streamed: texts, an embedded task, files on any storage, a dataset of the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from d3llm_ray.errors import unknown
from d3llm_ray.paths import not_uploaded
from d3llm_ray.tasks import EMBEDDED, Problem, Split, Task
from d3llm_ray.tasks.files import ENDINGS, no_rows, stem, stream_problems, to_problem, unreadable
from d3llm_ray.tasks.task import no_problems
from d3llm_ray.trajectories.folders import check_local, data_files
from d3llm_ray.trajectories.storage import Location

EMBEDDED_COUNT = 2000  # an embedded task is endless
ACCEPTED = (*EMBEDDED, "a .jsonl, .jsonl.gz or .parquet file or a folder of them (path or URI)", "owner/name[:config]")
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")  # owner/name:config

Read = Callable[[], Iterable[Problem]]


@dataclass(frozen=True)
class Source:
    """Prompts of a run, streamed: memory does not grow with their number."""

    name: str  # as the user wrote it
    task: Task  # judges answers; carries no problems, so that it can be sent to every actor
    total: int | None  # problems, where known without reading them
    read: Read = field(repr=False)
    count: int | None = None  # problems at most
    version: str | None = None  # of the files: names, sizes and times; None where it takes reading to know

    def problems(self) -> Iterator[Problem]:
        """The problems, anew at each call and always in the same order. `InputError` names a malformed row."""
        return islice(self.read(), self.count)


def open_source(prompts: str, texts: Sequence[str], split: Split, count: int | None) -> Source:
    """The first `count` problems (None: all, or 2000 of an embedded task) of `texts`, or where empty of `prompts`.

    `prompts` is an embedded task, a file or folder of files (a local path or a `pyarrow.fs` URI), or the name of a
    dataset of the Hub. Splits are those of an embedded task, of the Hub, and of files that are called after them (see
    `data_files`). Raises `InputError` when it cannot be read, has no rows, or has a malformed first row.
    """
    name, (total, read, version) = ("texts", _texts(texts)) if texts else (prompts, _open(prompts, split, count))
    if next(iter(read()), None) is None:
        raise no_rows(name)
    if total is not None and count is not None:
        total = min(total, count)
    task = Task(stem(name), no_problems)
    if not texts and prompts in EMBEDDED:
        task = replace(EMBEDDED[prompts], load=no_problems)
        task.check_judge()
    return Source(name, task, total, read, count, version)


Opened = tuple[int | None, Read, str | None]  # problems where known, reader of all of them, version where known


def _texts(texts: Sequence[str]) -> Opened:
    problems = [Problem(str(number), [{"role": "user", "content": text}]) for number, text in enumerate(texts)]
    return len(problems), lambda: problems, None


def _open(prompts: str, split: Split, count: int | None) -> Opened:
    if prompts in EMBEDDED:
        count = count or EMBEDDED_COUNT
        return count, partial(EMBEDDED[prompts].stream, split, count), None
    try:
        location = Location.of(prompts, "prompts")
        check_local(location, "prompts")
        if location.exists:
            return _open_files(prompts, location, split)
    except (OSError, pa.ArrowInvalid) as error:
        raise unreadable(prompts, error) from error
    if "://" in prompts or prompts.endswith(ENDINGS):
        raise unreadable(prompts, "no such file or folder")
    if match := _HUB.fullmatch(prompts):
        return _open_dataset(prompts, match[1], match[2], split)
    raise unknown("prompts", prompts, [*ACCEPTED[:-1], f"{ACCEPTED[-1]}{not_uploaded(prompts)}"])


def _open_files(prompts: str, location: Location, split: Split) -> Opened:
    files = {prompts: location}
    if location.is_folder:
        inside = data_files(location, ENDINGS, split, "prompts")
        files = {f"{prompts.rstrip('/')}{file.path[len(location.path) :]}": file for file in inside}
        for file in inside:
            check_local(file, "prompts")
    total = None
    paths = [file.path for file in files.values()]
    if all(path.endswith(".parquet") for path in paths):
        total = pads.dataset(paths, filesystem=location.filesystem, format="parquet").count_rows()  # footers alone
    infos = [(name, file.info) for name, file in files.items()]
    version = json.dumps([(name, info.size, info.mtime_ns) for name, info in infos])
    return total, partial(_file_problems, files), version


def _file_problems(files: dict[str, Location]) -> Iterator[Problem]:
    for name, file in files.items():
        yield from stream_problems(file.filesystem, file.path, name)


def _open_dataset(prompts: str, path: str, config: str | None, split: Split) -> Opened:
    import datasets  # 0.9 s

    try:
        splits = datasets.load_dataset(path, config, streaming=True)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise unreadable(prompts, f"no such path, and as a dataset of the Hub: {error}") from error
    if split not in splits:
        raise unknown(f"split of {prompts!r}", split, splits)
    rows = splits[split]
    sizes = rows.info.splits or {}
    total = (sizes[split].num_examples or None) if split in sizes else None
    return total, partial(_dataset_problems, rows, prompts), None


def _dataset_problems(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Problem]:
    for number, row in enumerate(rows, start=1):
        yield to_problem(row, f"prompts: row {number} of {name!r}")
