"""Whose an output folder is: one that an earlier run of ours began, by the settings it has left, or nobody's yet."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import yaml

from d3llm_ray.config import Settings, to_yaml
from d3llm_ray.errors import InputError
from d3llm_ray.report import check_output, write_text

MOST_NAMED = 5


def is_written(file: Path, cls: type[Settings]) -> bool:
    """Whether a run has written the file: most settings of `cls`, in the form of `to_yaml`, which nobody types."""
    try:
        text = file.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return False
    if not isinstance(values, dict) or yaml.safe_dump(values, sort_keys=False) != text:
        return False
    return len(values.keys() & cls.model_fields.keys()) > len(cls.model_fields) / 2  # some were called otherwise


def check_folder(output: str | os.PathLike[str], marker: str, cls: type[Settings], field: str = "output") -> Path:
    """The real folder behind `output`; `InputError` unless it is absent, empty (but for hidden files) or a run's.

    `marker`: name of the file of resolved settings, of class `cls`, that a run writes first: what makes a folder ours.
    """
    real = check_output(output, field, folder=True)
    names = visible(real)
    if names and not is_written(real / marker, cls):
        raise InputError(
            f"{field}: {os.fspath(output)!r} holds {named(names)} and no {marker} of an earlier run; accepted: such a "
            "run's folder, an empty one, or a name that is free"
        )
    return real


def claim(output: Path, marker: str, settings: Settings) -> None:
    """Make the folder and leave its `marker`; `InputError` where `check_folder` has one."""
    check_folder(output, marker, type(settings)).mkdir(parents=True, exist_ok=True)
    write_text(output / marker, to_yaml(settings))


def visible(folder: Path) -> list[str]:
    """The names in a folder that are not hidden, sorted; none without the folder."""
    return sorted(name for name in os.listdir(folder) if not name.startswith(".")) if folder.is_dir() else []


def named(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else ""
    return ", ".join(map(repr, listed[:MOST_NAMED])) + more
