"""What a module imports comes with the Makefile's environment, not with a package that happens to be installed too."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SET_UP = ("cluster", "quickstart", "chat", "dev")  # the extras that `make test` installs
OWN = {"d3llm_ray", "tests", "pretraining"}
OPTIONAL = {"PIL", "playwright"}  # of the extra `browser`, imported by tests of that mark only


def installed_by_setup() -> set[str]:
    """Distributions that the declared requirements bring, directly or through others."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for name in SET_UP for line in project["optional-dependencies"][name])]
    pending, seen = [(Requirement(line), "") for line in lines], set()
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if (key := (canonicalize_name(requirement.name), wanted)) not in seen:
                seen.add(key)
                try:
                    pending += [(Requirement(line), wanted) for line in requires(requirement.name) or ()]
                except PackageNotFoundError:
                    continue  # of another platform
    return {name for name, _ in seen}


def imported_at_once(path: Path) -> set[str]:
    """Top-level packages that a module's own level imports."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found - OWN - OPTIONAL - set(sys.stdlib_module_names)


def test_every_import_of_a_module_is_of_a_package_that_the_setup_brings() -> None:
    homes, brought = packages_distributions(), installed_by_setup()
    foreign: dict[str, list[str]] = {}
    for path in sorted(one for folder in ("d3llm_ray", "jobs", "tests") for one in (ROOT / folder).rglob("*.py")):
        for name in imported_at_once(path):
            if not {canonicalize_name(home) for home in homes.get(name, ())} & brought:
                foreign.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert foreign == {}
