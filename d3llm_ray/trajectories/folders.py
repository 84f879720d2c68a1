"""Which files a folder of data stands for: its own, those of a snapshot of the Hub, and of these one split's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pyarrow import fs

from d3llm_ray.errors import InputError, unknown
from d3llm_ray.models.folder import check_file
from d3llm_ray.paths import not_uploaded
from d3llm_ray.tasks.task import SPLITS, Split
from d3llm_ray.trajectories.storage import Location

SNAPSHOTS = "snapshots"  # of a dataset in the Hub's cache, a folder a version
CACHED = "datasets--"  # begins the name of a dataset in that cache
SHARD_OF = re.compile(r"(?P<split>[\w.-]+)-\d{5}-of-\d{5}(-[0-9a-f]{16})?")
MOST_NAMED = 5


def data_files(folder: Location, endings: tuple[str, ...], split: Split, field: str) -> list[Location]:
    """The files of a folder, sorted by name: those with `endings` directly in it, else in its `data/`, as snapshots
    of the Hub have them, or in a folder called after the split. A cached dataset stands for its snapshot.

    Where the files are called after splits (`train-00000-of-00002.parquet`, `test.jsonl`), those of `split`. Raises
    `InputError` without such files, with another split's only, and for several snapshots of which none is current.
    """
    for place in _places(folder, split, field):
        files = [file for file in place.files() if _is_data(file, endings)]
        if files:
            return _of_split(files, folder, split)
    accepted = f"a folder with {', '.join(endings)} files, directly or in data/{not_uploaded(folder.name)}"
    raise InputError(f"{field}: no data files in {folder.name!r}{_found(folder, endings)}; accepted: {accepted}")


def check_local(file: Location, field: str) -> None:
    """`InputError` for a file on this machine that only stands for one: a Git LFS pointer, a broken link."""
    if isinstance(file.filesystem, fs.LocalFileSystem):
        check_file(Path(file.path), field)


def base_name(file: Location) -> str:
    return file.path.rpartition("/")[2]


def _places(folder: Location, split: Split, field: str) -> Iterator[Location]:
    yield from (folder, folder / "data", folder / split)
    snapshots = [name for name in (folder / SNAPSHOTS).names() if not name.startswith(".")]
    main = folder / "refs" / "main"
    if len(snapshots) > 1 and main.exists:
        snapshots = [name for name in snapshots if name == main.read_text().strip()] or snapshots
    if len(snapshots) > 1:
        raise InputError(f"{field}: {folder.name!r} has the snapshots {', '.join(snapshots)}; accepted: one of them")
    for name in snapshots:
        yield from _places(folder / SNAPSHOTS / name, split, field)


def _is_data(file: Location, endings: tuple[str, ...]) -> bool:
    name = base_name(file)
    return name.endswith(endings) and not name.startswith(("_", "."))


def _of_split(files: list[Location], folder: Location, split: Split) -> list[Location]:
    splits = [_split_of(base_name(file)) for file in files]
    names = set(splits)
    if None in names or (len(names) == 1 and names.isdisjoint(SPLITS)):  # `part-00000-of-00002`, say
        return files
    if split not in names:
        raise unknown(f"split of {folder.name!r}", split, names)
    return [file for file, name in zip(files, splits, strict=True) if name == split]


def _split_of(name: str) -> str | None:
    stem = name.partition(".")[0]
    if match := SHARD_OF.fullmatch(stem):
        return match["split"]
    return stem if stem in SPLITS else None


def _found(folder: Location, endings: tuple[str, ...]) -> str:
    """What there is instead, to go on with."""
    inside = [name for name in folder.names() if (folder / name).is_folder and not name.startswith(".")]
    for cached in (name for name in inside if name.startswith(CACHED)):
        return f", a cache of the Hugging Face Hub with datasets such as {cached!r}"
    full = [name for name in inside if any(_is_data(file, endings) for file in (folder / name).files())]
    if full:
        return f" itself, but in its folders {', '.join(map(repr, full[:MOST_NAMED]))}"
    if isinstance(folder.filesystem, fs.LocalFileSystem):  # Arrow does not list broken links
        broken = [path.name for path in Path(folder.path).iterdir() if path.is_symlink() and not path.exists()]
        return f", {min(broken)!r} is a broken symbolic link" if broken else ""
    return ""
