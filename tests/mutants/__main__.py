"""Make every bug of the lists, one at a time, and see that its tests notice: `python -m tests.mutants`.

The checkout is never touched: a bug is made in a folder of links to it, in which one file is another. A process that
has imported the libraries, and nothing of this project, forks a child for each, which runs pytest in itself.

A bug whose tests do not end within the time limit counts as noticed, as `make test` ends such a test as failed; it is
named. Exit code 1 where a bug is not noticed, an entry is out of date, or a named test fails without any bug.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from tests.mutants.lists import ROOT, Mutant, read_mutants, rooms

# Slow to import, and the same for every bug.
LIBRARIES = (
    *("numpy", "torch", "transformers", "tokenizers", "safetensors.torch", "huggingface_hub", "peft", "yaml"),
    *("pytest", "_pytest.assertion.rewrite", "hypothesis.strategies", "pydantic_settings", "matplotlib.figure"),
    *("pyarrow.parquet", "pyarrow.dataset", "ray.data", "ray.train.torch", "ray.tune.search.optuna", "ray.serve"),
    *("optuna", "fastapi.testclient", "openai", "psutil", "datasets", "tensorboardX", "deepspeed"),
)
FROM_TRANSFORMERS = ("PreTrainedTokenizerFast", "Qwen2Tokenizer")  # which it imports late
LEFT_OUT = {".git", ".hypothesis", ".pytest_cache", ".venv", "runs"}
BASELINE_S = 1800.0
Outcome = Literal["killed", "killed by the time limit", "SURVIVED", "BROKEN"]


@dataclass
class Run:
    """A child that runs the tests of one bug, or (`mutant` None) those of all without any."""

    mutant: Mutant | None
    folder: Path
    pid: int
    began: float
    limit_s: float
    seconds: float = 0.0

    def outcome(self, status: int | None) -> Outcome:
        """What the exit status (None: it was stopped) says."""
        if status is None:
            return "killed by the time limit"
        outcomes: dict[int, Outcome] = {0: "SURVIVED", 1: "killed"}  # pytest: all passed, tests failed
        return outcomes.get(os.waitstatus_to_exitcode(status), "BROKEN")

    def stop(self) -> None:
        """End the child and all that it has started."""
        for end in (os.killpg, os.kill):  # it may not lead a group yet
            with suppress(ProcessLookupError):
                end(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def failed(self) -> list[str]:
        """Tests that did not pass."""
        report = self.folder / "report.json"
        return json.loads(report.read_text()) if report.is_file() else []

    def printed(self) -> str:
        return "\n".join((self.folder / "printed").read_text(errors="replace").splitlines()[-25:])


class NotPassed:
    """A plugin of pytest's that notes what failed or was skipped."""

    def __init__(self) -> None:
        self.tests: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.passed and report.nodeid not in self.tests:
            self.tests.append(report.nodeid)


def overlay(folder: Path, mutant: Mutant | None) -> Path:
    """A checkout in `folder` made of links, with the bug in its file; its neighbour `shared` is the checkout's."""
    changed = None if mutant is None else ROOT / mutant.file
    checkout = folder / "checkout"

    def link(source: Path, target: Path) -> None:
        if changed is None or source not in (changed, *changed.parents):
            target.symlink_to(source)
        elif source == changed:
            assert mutant is not None
            target.write_text(mutant.text(), encoding="utf-8")
            os.utime(target, (1, 1))  # no byte code of the original's is taken for this file's
        else:
            target.mkdir(parents=True)
            for entry in source.iterdir():
                link(entry, target / entry.name)

    checkout.mkdir(parents=True)
    for entry in ROOT.iterdir():
        if entry.name not in LEFT_OUT:
            link(entry, checkout / entry.name)
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return checkout


def start(mutant: Mutant | None, tests: Sequence[str], folder: Path, limit_s: float) -> Run:
    """Fork a child that runs the tests in an overlay of its own."""
    checkout = overlay(folder, mutant)
    pid = os.fork()
    if pid == 0:
        code = 3  # of pytest, for errors of its own
        try:
            code = _test(checkout, tests, stop_early=mutant is not None)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return Run(mutant, folder, pid, time.monotonic(), limit_s)


def _test(checkout: Path, tests: Sequence[str], *, stop_early: bool) -> int:
    os.setsid()
    printed = os.open(checkout.parent / "printed", os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(checkout)
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=str(checkout))
    sys.path[:] = [str(checkout), *(path for path in sys.path if path not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    import pytest

    options = ["-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", f"--basetemp={checkout.parent / 'tmp'}"]
    not_passed = NotPassed()
    code = pytest.main([*options, *(["-x"] if stop_early else []), *tests], plugins=[not_passed])
    (checkout.parent / "report.json").write_text(json.dumps(not_passed.tests))
    return int(code)


def wait(running: list[Run]) -> tuple[Run, int | None]:
    """The next child that ends, and its exit status; None for one that had to be stopped."""
    while True:
        for run in running:
            run.seconds = time.monotonic() - run.began
            pid, status = os.waitpid(run.pid, os.WNOHANG)
            if pid == 0 and run.seconds > run.limit_s:
                run.stop()
                pid, status = run.pid, None
            if pid:
                running.remove(run)
                return run, status
        time.sleep(0.02)


def preload() -> None:
    """Import what takes long, so that children find it done."""
    os.chdir(ROOT)
    importlib.import_module("tests.conftest")  # the environment that the libraries read
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # an extra that is not installed: tests that need it say so
    for name in FROM_TRANSFORMERS:
        getattr(sys.modules["transformers"], name)
    for plugin in entry_points(group="pytest11"):
        plugin.load()
    assert "d3llm_ray" not in sys.modules
    gc.freeze()


def check_unchanged(mutants: Sequence[Mutant], folder: Path) -> list[str]:
    """Run all named tests without any bug; what is wrong with them."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    run, status = wait([start(None, tests, folder, BASELINE_S)])
    print(f"{len(tests)} tests without any bug: {run.seconds:.0f} s", flush=True)
    failed = [f"without any bug: {test} fails or is skipped" for test in run.failed()]
    if status != 0 and not failed:
        failed = [f"without any bug: pytest stopped\n{run.printed()}"]
    return failed


def run_all(mutants: Sequence[Mutant], workers: int, limit_s: float, folder: Path) -> list[str]:
    """Make every bug; returns a line for each that is not noticed."""
    pending, problems = list(enumerate(mutants))[::-1], []
    running: list[Run] = []
    try:
        while pending or running:
            while pending and len(running) < workers:
                number, mutant = pending.pop()
                running.append(start(mutant, mutant.tests, folder / str(number), limit_s))
            run, status = wait(running)
            problems += judge(run, status)
            shutil.rmtree(run.folder)
    finally:
        for run in running:  # of an interrupted call
            run.stop()
    return problems


def judge(run: Run, status: int | None) -> list[str]:
    """Print how a bug's tests ended; a line for one that was not noticed."""
    assert run.mutant is not None
    outcome, where = run.outcome(status), f"{run.mutant.room}: {run.mutant.name}"
    print(f"{outcome:<8} {run.seconds:5.1f} s  {'  '.join((where, *run.failed()[:1]))}", flush=True)
    if outcome == "BROKEN":
        return [f"{outcome}: {where}: pytest could not run the tests\n{run.printed()}"]
    return [f"{outcome}: {where} ({run.mutant.file})"] if outcome == "SURVIVED" else []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--room", choices=rooms(), help="one list alone")
    parser.add_argument("--only", metavar="NAME", help="bugs with this in their name alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="bugs at a time")
    parser.add_argument("--limit-s", type=float, default=120.0, help="seconds that a bug's tests may take")
    options = parser.parse_args(argv)
    chosen = [mutant for room in rooms() if options.room in (None, room) for mutant in read_mutants(room)]
    chosen = [mutant for mutant in chosen if options.only is None or options.only in mutant.name]
    stale = {mutant: list(mutant.faults()) for mutant in chosen}
    problems = [f"STALE: {m.room}: {m.name}: {fault}" for m, faults in stale.items() for fault in faults]
    mutants = [mutant for mutant in chosen if not stale[mutant]]
    began = time.monotonic()
    preload()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        unsound = check_unchanged(mutants, Path(folder) / "unchanged") if mutants else []
        problems += unsound or run_all(mutants, options.workers, options.limit_s, Path(folder))
    print(f"\n{len(mutants)} bugs in {time.monotonic() - began:.0f} s, {len(problems)} problems")
    print(*problems, sep="\n")
    return 1 if problems or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
