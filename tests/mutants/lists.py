"""The lists of deliberate bugs: what each changes, in which file, and which tests must notice."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
LISTS = Path(__file__).parent
KEYS = {"name", "file", "old", "new", "tests"}


@dataclass(frozen=True)
class Mutant:
    """One deliberate bug: `old`, which stands in `file` once, becomes `new`, and one of `tests` fails."""

    room: str
    name: str
    file: str  # from the root of the repository
    old: str
    new: str
    tests: tuple[str, ...]  # pytest's node ids

    def text(self) -> str:
        """The file with the bug in it."""
        return _read(ROOT / self.file).replace(self.old, self.new)

    def faults(self) -> Iterator[str]:
        """Why this entry says nothing about the code as it is."""
        path = ROOT / self.file
        if not path.is_file():
            yield f"no file {self.file}"
        elif (count := _read(path).count(self.old)) != 1:
            yield f"the old text stands {count} times in {self.file}"
        if self.old == self.new:
            yield "it changes nothing"
        if not self.tests:
            yield "no tests"
        for test in self.tests:
            file, _, function = test.partition("::")
            if not (ROOT / file).is_file():
                yield f"no file {file}"
            elif function and function.partition("[")[0] not in _functions(ROOT / file):
                yield f"no test {test}"


@cache
def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(_read(path)).body if isinstance(node, ast.FunctionDef)}


def rooms() -> list[str]:
    """Names of the lists, a file each."""
    return sorted(path.stem for path in LISTS.glob("*.yaml"))


def read_mutants(room: str) -> list[Mutant]:
    """The entries of one list; `ValueError` names one that has other keys than it must."""
    mutants = []
    for number, entry in enumerate(yaml.safe_load(_read(LISTS / f"{room}.yaml")), start=1):
        if entry.keys() != KEYS:
            raise ValueError(f"{room}.yaml, entry {number}: has {sorted(entry)}; accepted: {sorted(KEYS)}")
        mutants.append(Mutant(**{**entry, "room": room, "tests": tuple(entry["tests"])}))
    return mutants
