"""`docs/paper.md`: every idea of the paper is where the table says, by its symbol and by its words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IDEAS_TEXT, DIFFERENCES_TEXT = (ROOT / "docs/paper.md").read_text().split("## Where the published code differs")


def table(text: str) -> list[tuple[str, ...]]:
    """The rows of a text's one table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


ROWS = table(IDEAS_TEXT)
IDEAS = {  # of arXiv:2601.07568, whatever the table holds
    "pseudo-trajectory",
    "noise curriculum",
    "window curriculum",
    "certainty forcing",
    "complementary view",
    "block states",
    "delayed cache",
    "refresh",
    "early stop",
    "AUP",
    "entropy-based selection",
    "teacher trajectory",
    "guaranteed progress",
}


def defined(tree: ast.Module) -> set[str]:
    """Names that a module defines at its top, and the methods of its classes as `Class.method`."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names.update(f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef))
        if isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names


def words_of(source: str) -> str:
    """A file's text in small letters on one line, so that words are found across the line breaks of its comments."""
    return " ".join(re.sub(r"^\s*#+", " ", source, flags=re.MULTILINE).lower().split())


def test_the_table_has_every_idea() -> None:
    assert {re.split(r" \(", idea)[0] for idea, *_ in ROWS} >= IDEAS


@pytest.mark.parametrize(("idea", "what", "symbol", "file"), ROWS, ids=[f"{row[0]}, {row[2]}" for row in ROWS])
def test_an_idea_is_where_the_table_says(idea: str, what: str, symbol: str, file: str) -> None:
    source = (ROOT / file.strip("`")).read_text()
    assert symbol.strip("`") in defined(ast.parse(source))
    terms = [term.strip() for term in re.split("[(),]", idea.lower())]
    missing = [term for term in terms if term not in words_of(source)]
    assert not missing, f"{file} does not say {missing}"


def test_every_difference_says_what_is_published_what_is_done_here_and_how_to_change_it() -> None:
    rows = table(DIFFERENCES_TEXT)
    assert len(rows) >= 10 and all(len(row) == 4 and all(row) for row in rows)
    named = " ".join(row[3] for row in rows)
    for setting in ("window_domain", "max_length", "target", "early_stop", "repeat_finished"):
        assert f"`{setting}" in named or f"{{{setting}" in named, setting
