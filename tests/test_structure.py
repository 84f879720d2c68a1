"""The house: which room may import which, no circles, one meaning a name, small modules, a small core."""

from __future__ import annotations

import ast
import graphlib
import sys
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "d3llm_ray"
BASE = {
    *("__init__", "errors", "config", "progress", "report", "output_folder", "device", "paths", "verbs", "yaml_file"),
    "mathematics",
    "terminal",
}
EDGE_BASE = {"metrics", "cluster"}
CORE = {"models", "decoding", "tasks"}
# What a room may import beside itself and the base.
ROOMS: dict[str, set[str]] = {
    **{name: set() for name in BASE},
    **{name: set() for name in EDGE_BASE},
    "models": set(),
    "judging": set(),
    "tasks": {"judging"},
    "decoding": {"models"},
    "generate": {"decoding", "models", "tasks"},
    "trajectories": {"decoding", "models", "tasks", *EDGE_BASE},
    "distillation": {"decoding", "models", "tasks", "trajectories", *EDGE_BASE},
    "serving": {"decoding", "models", *EDGE_BASE},
}
ROOMS["clients"] = {"serving", *ROOMS["serving"]}
ROOMS["evaluation"] = {"clients", "tasks", "judging", *ROOMS["clients"]}
ROOMS["harness"] = {"evaluation", *ROOMS["evaluation"]}
ROOMS["tuning"] = {"evaluation", *ROOMS["evaluation"]}
ROOMS["leaderboard"] = {"evaluation", *ROOMS["evaluation"]}
ROOMS["checks"] = {"evaluation", "tuning", *ROOMS["evaluation"]}
ROOMS["ablation"] = {*ROOMS["distillation"], "distillation", "evaluation"}
ROOMS["benchmark"] = {*ROOMS["trajectories"], *ROOMS["serving"], "trajectories", "distillation", "serving", "clients"}
ROOMS["quickstart"] = {*ROOMS, "benchmark"}
ROOMS["cli"] = {*ROOMS, "quickstart"}

CORE_PACKAGES = {
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "numpy",
    "huggingface_hub",
    "triton",
    "yaml",
}
LATE_CORE_PACKAGES = {"flash_attn", "pyarrow", "datasets"}  # imported where they are needed, if they are there
EDGES_ONLY = {"ray", "deepspeed", "fastapi", "pydantic", "pydantic_settings"}
VALIDATES = {"distillation.training.validation", "distillation.preparation"}  # decodes, and checks beforehand
MOST_LINES = 300
MOST_CORE_LINES = 3900
COLLECTIONS = ("tasks/arith.py", "tasks/code.py", "tasks/published/")  # of problems: they grow, nobody reads them first


@cache
def modules() -> dict[str, ast.Module]:
    """Syntax trees by dotted name below the package."""
    return {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def is_late(node: ast.AST) -> bool:
    """Whether a node's body runs after its module has been imported, or only for type checkers."""
    if isinstance(node, ast.If):
        return getattr(node.test, "id", "") == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def imports(tree: ast.AST, *, late: bool) -> set[str]:
    """Dotted names that a module imports; without `late` only what is imported with the module itself."""
    found: set[str] = set()
    pending = list(ast.iter_child_nodes(tree))
    while pending:
        node = pending.pop()
        if is_late(node):
            pending += node.body if late else []
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        else:
            pending += ast.iter_child_nodes(node)
    return found


def inside(imported: set[str]) -> set[str]:
    """The package's own modules among dotted names."""
    own = set()
    for name in imported:
        parts = name.split(".")
        if parts[0] == "d3llm_ray":
            rest = parts[1:]
            while rest and ".".join(rest) not in modules():
                rest = rest[:-1]
            own.add(".".join(rest) or "__init__")
    return own


def test_every_file_that_is_no_module_is_installed_with_its_package() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    installed = {
        path
        for package, globs in patterns.items()
        for glob in globs
        for path in (ROOT / package.replace(".", "/")).glob(glob)
    }
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others - installed == set()


def test_every_room_is_in_the_table() -> None:
    assert {name.split(".")[0] for name in modules()} == set(ROOMS)


def reached_without_torch(start: str) -> set[str]:
    """Modules that importing `start` imports, none of which may import torch or transformers."""
    pending, seen = {start}, set()
    while pending:
        name = pending.pop()
        seen.add(name)
        imported = imports(modules()[name], late=False)
        assert not {one for one in imported if one.split(".")[0] in ("torch", "transformers")}, name
        pending |= inside(imported) - seen
    return seen


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_arrows_point_where_the_table_says(room: str) -> None:
    allowed = ROOMS[room] | BASE | {room}
    for name, tree in modules().items():
        if name.split(".")[0] != room or (room == "__init__"):
            continue  # the package's own names are imported late
        for target in inside(imports(tree, late=True)):
            assert target.split(".")[0] in allowed, f"{name} imports {target}"


def test_distillation_takes_of_trajectories_the_schema_and_of_decoding_what_validates() -> None:
    for name, tree in modules().items():
        if name.split(".")[0] != "distillation":
            continue
        taken = {target for target in inside(imports(tree, late=True))}
        assert {target for target in taken if target.startswith("trajectories")} <= {"trajectories.schema"}, name
        if any(target.split(".")[0] == "decoding" for target in taken):
            assert name in VALIDATES, name


def test_there_is_no_circle() -> None:
    """Neither of modules nor of rooms, in what is imported at once."""
    modules_of = {name: inside(imports(tree, late=False)) - {name, "__init__"} for name, tree in modules().items()}
    rooms_of: dict[str, set[str]] = defaultdict(set)
    for name, targets in modules_of.items():
        room = name.split(".")[0]
        rooms_of[room] |= {target.split(".")[0] for target in targets} - {room}
    for graph in (modules_of, rooms_of):
        list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("name", sorted(name for name in modules() if name.split(".")[0] in CORE | BASE - {"config"}))
def test_the_core_runs_without_the_edges(name: str) -> None:
    room = name.split(".")[0]
    early = {target.split(".")[0] for target in imports(modules()[name], late=False)}
    late = {target.split(".")[0] for target in imports(modules()[name], late=True)}
    assert not late & EDGES_ONLY
    if room in CORE:
        foreign = early - sys.stdlib_module_names - CORE_PACKAGES - {"d3llm_ray", "jinja2"}
        assert not foreign
        assert not late - early - sys.stdlib_module_names - CORE_PACKAGES - LATE_CORE_PACKAGES - {"d3llm_ray"}


def test_a_class_name_has_one_meaning() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_modules_can_be_read_at_one_sitting() -> None:
    files = [path for folder in ("d3llm_ray", "jobs") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_the_core_is_small() -> None:
    """Lines of `models`, `decoding` and `tasks` that are not blank, but for the collections of problems."""
    files = [path for room in CORE for path in (PACKAGE / room).rglob("*.py")]
    counted = [path for path in files if not str(path.relative_to(PACKAGE)).startswith(COLLECTIONS)]
    lines = sum(bool(line.strip()) for path in counted for line in path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_CORE_LINES
