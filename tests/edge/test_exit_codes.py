"""How every verb ends: its exit code and its last line, whatever went wrong; and what is refused before the work."""

from __future__ import annotations

import ast
import asyncio
import errno
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from d3llm_ray import cli
from d3llm_ray.cli import EXIT_CODES, VERBS, main
from d3llm_ray.cluster import connect
from d3llm_ray.config import build
from d3llm_ray.errors import DecodingError, IncompleteError, InputError, StorageError
from d3llm_ray.evaluation.run import run as evaluate
from d3llm_ray.evaluation.settings import EvaluateSettings
from d3llm_ray.report import check_output, replacing
from d3llm_ray.trajectories.storage import Location
from tests.edge.test_job_package import NEEDED

ROOT = Path(__file__).parents[2]
RESUMING = {
    "quickstart",
    "trajectories",
    "distill",
    "ablate",
    "evaluate",
    "leaderboard",
    "check",
    "check transfer",
    "tune",
    "batch",
}
KEPT = "what is finished is kept, and the same command goes on from there"
ANEW = "nothing is kept, and the same command begins anew"


class InAWorker(OSError):
    """As Ray raises an error of a worker: its text is the worker's traceback, the error itself its cause."""

    def __init__(self) -> None:
        super().__init__("ray::f()\n  File ...\nOSError: [Errno 28] No space left on device: 'part'")
        self.cause = OSError(errno.ENOSPC, "No space left on device", "part")


# What a verb's function raises -> exit code, words of the line, and whether the line says what is kept.
ENDS: list[tuple[BaseException | None, int, str, bool]] = [
    (None, 0, "", False),
    (InputError("rows: got 1; accepted: 2"), 2, "rows: got 1; accepted: 2", False),
    (DecodingError("prompts[0]: not finite"), 1, "prompts[0]: not finite", False),
    (IncompleteError("prompts: 1 of 2 not answered"), 1, "prompts: 1 of 2 not answered", False),
    (StorageError(None, "no such bucket: s3://b"), 1, "no such bucket: s3://b; ", True),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device; ", True),
    (OSError(errno.EROFS, "Read-only file system"), 1, "Read-only file system; ", True),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, "Disk quota exceeded; ", True),
    (OSError(errno.EIO, "Input/output error"), 1, "Input/output error; ", True),
    (InAWorker(), 1, "No space left on device: 'part'; ", True),
    (PermissionError(errno.EACCES, "Permission denied", "OUT/part"), 1, "Permission denied: 'OUT/part'; ", True),
    (PermissionError(errno.EACCES, "Permission denied", "/in/a"), 2, "cannot read '/in/a': Permission denied", False),
    (FileNotFoundError(errno.ENOENT, "No such file", "/in/b"), 2, "cannot read '/in/b': No such file", False),
    (ConnectionError("refused\nby host"), 1, "refused by host", False),
    (ConnectionResetError(errno.ECONNRESET, "reset by peer"), 1, "ConnectionResetError: ", False),
    (BrokenPipeError(errno.EPIPE, "of a socket"), 1, "of a socket", False),
    (OSError("Can't load the tokenizer of 'x'"), 1, "Can't load the tokenizer of 'x'", False),
    (ModuleNotFoundError("No module named 'ray.data'", name="ray.data"), 2, 'pip install "d3llm-ray[cluster]"', False),
    (ModuleNotFoundError("No module named 'openai'", name="openai"), 2, 'pip install "d3llm-ray[quickstart]"', False),
    (ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn"), 2, '"d3llm-ray[gpu]"', False),
    (ModuleNotFoundError("No module named 'tensorboardX'", name="tensorboardX"), 2, '"d3llm-ray[cluster]"', False),
    (ModuleNotFoundError("No module named 'peft'", name="peft"), 2, "pip install d3llm-ray\n", False),
    (KeyboardInterrupt(), 130, "interrupted; ", True),
]


def runs_instead(monkeypatch: pytest.MonkeyPatch, function: Callable[[Any], object]) -> None:
    """Every verb calls `function` with its settings."""
    load = cli._load
    monkeypatch.setattr(cli, "_load", lambda name: load(name) if name.endswith("Settings") else function)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_ends_with_the_code_and_line_of_what_went_wrong(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    error = None

    def run(_settings: Any) -> None:
        if error is not None:
            raise error

    runs_instead(monkeypatch, run)
    words = [*verb.split(), *NEEDED.get(verb, []), *(["--output", "OUT"] if verb in NEEDED else [])]
    for error, code, line, kept in ENDS:  # `run` raises it
        if error is not None and "OUT" in str(error) and verb not in NEEDED:
            continue
        assert main(words) == code, error
        said = capsys.readouterr().err
        assert line in said and said.count("\n") == (0 if code == 0 else 1), error
        assert (KEPT in said, ANEW in said) == (kept and verb in RESUMING, kept and verb not in RESUMING), error


@pytest.fixture
def sigint() -> Iterator[Callable[[Any], Any]]:
    """Sets the handler of SIGINT; both signals' are those of before again in the end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("ignored", [False, True])
def test_sigterm_interrupts_a_verb_and_cancels_what_its_event_loop_runs(
    ignored: bool, sigint: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sigint(signal.SIG_IGN if ignored else signal.default_int_handler)
    seen: list[type[BaseException]] = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(10)
        except BaseException as error:
            seen.append(type(error))
            raise

    runs_instead(monkeypatch, lambda _: asyncio.run(work()))
    assert main(["generate", "--prompt", "x"]) == 130
    assert "d3llm-ray: interrupted; " in capsys.readouterr().err
    assert seen == [KeyboardInterrupt if ignored else asyncio.CancelledError]


def test_sigterm_is_ours_whatever_a_library_does_with_sigint(
    sigint: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray Train takes SIGINT for itself, and ends the process where it cannot abort."""

    def work(_settings: Any) -> None:
        sigint(lambda *_: pytest.fail("the library's handler"))
        os.kill(os.getpid(), signal.SIGTERM)

    runs_instead(monkeypatch, work)
    assert main(["generate", "--prompt", "x"]) == 130
    assert "d3llm-ray: interrupted; " in capsys.readouterr().err


def test_a_module_of_ours_that_is_missing_is_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_name: str) -> None:
        raise ModuleNotFoundError("No module named 'd3llm_ray.nothing'", name="d3llm_ray.nothing")

    monkeypatch.setattr(cli, "_load", run)
    with pytest.raises(ModuleNotFoundError):
        main(["serve"])


def test_help_and_documentation_list_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(EXIT_CODES) == [0, 1, 2, 130, 141]
    assert main(["--help"]) == 0
    usage, page = capsys.readouterr().out, (ROOT / "docs" / "exit_codes.md").read_text()
    for code, meaning in EXIT_CODES.items():
        assert f"\n  {code} " in usage and meaning in usage
        assert f"| {code} | " in page
    assert "docs/exit_codes.md" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("verb", NEEDED)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(*_: object, **__: object) -> None:
        pytest.fail("the work has begun")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ray.init", started)
    monkeypatch.setattr("d3llm_ray.models.checkpoint.load_model", started)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "2 + 3 ="}\n')
    # Nobody can write to /proc, root included.
    for output, reason in (
        ("/proc/out", "cannot be written: .*'/proc'"),
        ("n" * 256, "cannot be written: File name too long"),
        ("prompts.jsonl/out", "lies below a file"),
    ):
        assert main([*verb.split(), *NEEDED[verb], "--output", output]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith("d3llm-ray: output: ")
        assert re.search(reason, captured.err), captured.err
    assert os.listdir(tmp_path) == ["prompts.jsonl"]


def full(_: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_output_is_tried_where_it_will_be_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []
    touch = Path.touch
    monkeypatch.setattr(Path, "touch", lambda path: (tried.append(path.parent), touch(path))[1])
    (tmp_path / "there").mkdir()
    check_output(tmp_path / "there", "output", folder=True)
    check_output(tmp_path / "there" / "new" / "folder", "output", folder=True)
    check_output(tmp_path / "there" / "new.jsonl", "output")
    check_output(tmp_path / "new.jsonl", "output")
    assert tried == [tmp_path / "there"] * 3 + [tmp_path]
    assert os.listdir(tmp_path) == ["there"] and os.listdir(tmp_path / "there") == []
    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(StorageError, match="No space left on device: .*new.jsonl"):  # nobody asked for a full disk
        check_output(tmp_path / "new.jsonl", "output")
    for url in ("s3://bucket/a", Path("s3://bucket/a"), "gs://b/c"):
        with pytest.raises(InputError, match="is a URL; accepted: a local path"):
            check_output(url, "output")
    with pytest.raises(InputError, match="^output: .*null byte"):
        check_output("a\0b", "output")


def test_what_fails_to_be_written_is_named_and_the_storages_fault(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left on device: .*report.md"), replacing(tmp_path / "report.md"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageError, match="rows.parquet"), Location.of(tmp_path / "rows.parquet")._replaced():
        raise OSError("quota")  # as Arrow says it: without a number
    assert os.listdir(tmp_path) == []


def run_module(*words: str, code: str = "", **options: Any) -> subprocess.Popen[str]:
    script = f"import sys; {code}\nfrom d3llm_ray.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", script, *words], cwd=ROOT, text=True, **options)


def test_a_reader_that_goes_away_ends_the_process_quietly() -> None:
    with run_module("--help", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # as `head` does, long before Python has started
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_result_that_nobody_reads_ends_a_verb_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs_instead(monkeypatch, lambda _: "x" * 99_999)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["generate"]) == 141
    assert capsys.readouterr().err == ""


def test_pipes_of_others_are_not_taken_for_a_reader(capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.close()
        assert cli._hang_up() is False


@pytest.mark.parametrize(
    ("package", "words", "extra"),
    [("ray", ["trajectories", "--count", "1"], "cluster"), ("pydantic_settings", ["generate"], None)],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    package: str, words: list[str], extra: str | None, tmp_path: Path
) -> None:
    code = f"sys.modules[{package!r}] = None"
    with run_module(*words, code=code, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        said = process.communicate()[1]
    wanted = f'pip install "d3llm-ray[{extra}]"' if extra else "pip install d3llm-ray"
    assert process.returncode == 2 and said.count("\n") == 1 and package in said and wanted in said


def test_a_cluster_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("Failed to connect\nto 10.0.0.9:6379")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("d3llm_ray.cluster._ENVIRONMENT", {})
    with pytest.raises(InputError, match="^RAY_ADDRESS: got '10.0.0.9:6379': Failed to connect to 10.0.0.9:6379; acc"):
        connect()


def test_results_are_written_without_matplotlib(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    values = {"models": [str(tiny_checkpoint)], "decoders": ["vanilla"], "count": 1, "max_tokens": 8, "warmup": 0}
    evaluate(build(EvaluateSettings, {**values, "output": str(tmp_path / "out")}))
    assert {"report.json", "report.md"} <= set(os.listdir(tmp_path / "out"))
    assert not list(tmp_path.rglob("*.png"))
    said = [line for line in capsys.readouterr().err.splitlines() if "matplotlib" in line]
    assert len(said) == 1 and "accuracy_vs_tpf.png" in said[0] and 'pip install "d3llm-ray[cluster]"' in said[0]


def test_matplotlib_is_imported_only_where_something_is_drawn() -> None:
    """At the top of `plots` modules, which nothing imports at its own top; so that every verb does without."""

    def early(tree: ast.Module) -> list[str]:
        nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        return [getattr(node, "module", None) or node.names[0].name for node in nodes]

    for path in (ROOT / "d3llm_ray").rglob("*.py"):
        for module in early(ast.parse(path.read_text())):
            assert path.stem == "plots" or module.partition(".")[0] != "matplotlib", path
            assert not module.endswith(".plots"), path
