"""The lists of deliberate bugs fit the code as it is; `make mutants` makes the bugs."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants.__main__ import overlay
from tests.mutants.lists import ROOT, Mutant, read_mutants, rooms

# A list for each, and where its bugs are.
ROOMS = {
    "ablation": ["ablation/"],
    "benchmark": ["benchmark/"],
    "checks": ["checks/"],
    "clients": ["clients/"],
    "command_line": ["cli", "verbs", "config", "yaml_file", "paths", "generate", "report", "output_folder", "progress"],
    "decoding": ["decoding/"],
    "distillation": ["distillation/"],
    "evaluation": ["evaluation/", "harness/"],
    "leaderboard": ["leaderboard/"],
    "models": ["models/"],
    "quickstart": ["quickstart/"],
    "serving": ["serving/", "metrics"],
    "tasks": ["tasks/", "judging/", "mathematics", "../jobs/pretraining/"],
    "trajectories": ["trajectories/"],
    "tuning": ["tuning/"],
}


def test_every_room_has_a_list_and_together_they_are_long() -> None:
    assert rooms() == sorted(ROOMS)
    assert sum(len(read_mutants(room)) for room in rooms()) >= 100


@pytest.mark.parametrize("room", rooms())
def test_a_list_fits_the_code(room: str) -> None:
    """Every old text stands once in its file, every test exists, no two entries are alike."""
    mutants = read_mutants(room)
    assert {mutant.name: faults for mutant in mutants if (faults := list(mutant.faults()))} == {}
    assert [name for name, count in Counter(mutant.name for mutant in mutants).items() if count > 1] == []
    changes = Counter((mutant.file, mutant.old, mutant.new) for mutant in mutants)
    assert [change for change, count in changes.items() if count > 1] == []
    places = tuple(os.path.normpath(f"d3llm_ray/{place}") for place in ROOMS[room])
    assert [mutant.name for mutant in mutants if not mutant.file.startswith(places)] == []


HERE = str(Path(__file__).relative_to(ROOT))
MUTANT = Mutant("command_line", "a test", "d3llm_ray/errors.py", "class InputError(", "class OtherError(", (HERE,))


def test_what_is_out_of_date_is_said() -> None:
    tests = ("tests/nowhere.py", f"{HERE}::test_no", f"{HERE}::test_what_is_out_of_date_is_said[a]")
    assert list(replace(MUTANT, old="class NoError(", tests=tests).faults()) == [
        "the old text stands 0 times in d3llm_ray/errors.py",
        "no file tests/nowhere.py",
        "no test tests/mutants/test_lists.py::test_no",
    ]
    assert list(replace(MUTANT, old=" ", new=" ", tests=()).faults()) == [
        f"the old text stands {(ROOT / MUTANT.file).read_text().count(' ')} times in d3llm_ray/errors.py",
        "it changes nothing",
        "no tests",
    ]
    assert not list(MUTANT.faults())


def test_a_bug_is_made_beside_the_checkout(tmp_path: Path) -> None:
    original = (ROOT / MUTANT.file).read_text()
    checkout = overlay(tmp_path / "work", MUTANT)
    changed = checkout / MUTANT.file
    assert changed.read_text() == original.replace("class InputError(", "class OtherError(")
    assert not changed.is_symlink() and (ROOT / MUTANT.file).read_text() == original
    others = [path for path in (checkout / "d3llm_ray").iterdir() if path != changed]
    assert others and all(path.is_symlink() for path in others)
    assert all(os.path.samefile(path, ROOT / "d3llm_ray" / path.name) for path in others)
    assert os.path.samefile(checkout / "tests", ROOT / "tests") and not (checkout / ".git").exists()
