"""Every command and Python snippet that the docs, the jobs and the YAML files show is one that this version accepts."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from d3llm_ray.cli import VERBS
from d3llm_ray.config import parse
from d3llm_ray.errors import InputError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*PAGES, *sorted(ROOT.glob("jobs/*.py")), *sorted(ROOT.glob("[dst]*/**/*.yaml"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)")
SCRIPT = re.compile(r"python (jobs/\w+\.py)")


def prose_of(source: Path) -> str:
    """What a page, a script's docstring or a YAML file's comments say, as Markdown."""
    text = source.read_text()
    if source.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    if source.suffix == ".yaml":
        return "".join(f"    {line[1:].strip()}\n" for line in text.splitlines() if line.startswith("#"))
    return text


def commands(source: Path) -> Iterator[str]:
    """The commands of code blocks and of code within a line, each as a single line."""
    text = prose_of(source)
    blocks = [match[2] for match in FENCED.finditer(text) if match[1] in ("", "sh", "bash")]
    prose = FENCED.sub("", text)
    blocks += INDENTED.findall(prose)
    lines = [line for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    lines += [" ".join(code.split()) for code in INLINE.findall(INDENTED.sub("", prose))]
    for line in lines:
        start = re.search(r"(?:^|\s)(d3llm-ray [a-z]|(?:ray job submit|python jobs/).*\.py)", line)
        if start:
            yield re.split(r"\s{2,}(?![\s-])", line[start.start() :].strip())[0]  # a comment may follow


def arguments(command: str) -> list[str]:
    """The words behind `d3llm-ray` that a command comes to, by way of a script of `jobs/` or not."""
    script = SCRIPT.search(command)
    if script is None:
        return shlex.split(command)[1:]
    source = (ROOT / script[1]).read_text()
    verb = re.search(r"main\(\[\"([a-z ]+)\", \*sys\.argv", source)
    assert verb, f"{script[1]} runs no verb"
    return [*verb[1].split(), *shlex.split(command[script.end() :].replace("--config FILE.yaml", ""))]


SHOWN = {
    f"{source.name}: {command}": command
    for source in SOURCES
    for command in commands(source)
    if not re.search("jobs/(pretrain_tiny|gpu_check)", command)  # scripts with a parser of their own
}


def test_commands_are_found() -> None:
    """Or the other tests would hold for want of anything to hold."""
    verbs = {arguments(command)[0] for command in SHOWN.values()}
    assert {"trajectories", "distill", "tune", "evaluate", "serve", "benchmark", "ablate", "generate"} <= verbs
    assert len(SHOWN) > 40


@pytest.mark.parametrize("command", SHOWN.values(), ids=SHOWN)
def test_a_shown_command_is_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = arguments(command)
    length = 2 if " ".join(words[:2]) in VERBS else 1
    name, rest = " ".join(words[:length]), words[length:]
    assert name in VERBS, f"no verb {name!r}"
    if rest == ["--help"]:
        return
    module, _, attribute = VERBS[name].settings.partition(":")
    settings = getattr(importlib.import_module(module), attribute)
    try:
        parse(settings, [word for word in rest if word != "..."])
    except InputError as error:
        # A verb that is only named, as in "`d3llm-ray distill` trains", or a "..." leaves out what is required.
        assert (not rest or "..." in rest) and str(error).endswith(": required"), error


def test_the_makefile_s_commands_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = re.findall(r"^\t\$\(BIN\)/(d3llm-ray .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert any("docs/decoders.yaml" in command for command in shown)
    for command in shown:
        test_a_shown_command_is_accepted(command, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_python_names_what_there_is(page: Path) -> None:
    """Imports resolve, and calls of what is imported from the package take the keywords that are written."""
    for language, source in FENCED.findall(page.read_text()):
        if language != "python":
            continue
        tree, known = ast.parse(source), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("d3llm_ray"):
                module = importlib.import_module(node.module or "")
                known.update({alias.asname or alias.name: getattr(module, alias.name) for alias in node.names})
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
                accepted = inspect.signature(known[node.func.id]).parameters
                written = {keyword.arg for keyword in node.keywords}
                assert written <= set(accepted), f"{node.func.id}: {written - set(accepted)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files exist, and headings of our pages as well."""
    for target, heading in LINK.findall(FENCED.sub("", page.read_text())):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{page.name} links to {target}#{heading}"


def test_the_readme_is_a_tour() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
