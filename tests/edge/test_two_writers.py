"""Two runs never write one output: the second is told of the first, in every verb, and no lock outlives its run."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d3llm_ray.cli import VERBS, _load
from d3llm_ray.config import build
from d3llm_ray.distillation.local import distil_here
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.errors import InputError
from d3llm_ray.output_folder import writing

# What each verb needs to be called.
NEEDED: dict[str, dict[str, Any]] = {
    "generate": {"prompts": "prompts.jsonl"},
    "batch": {"input": "requests.jsonl"},
    "evaluate": {"models": ["tiny-llada"]},
    "check": {"check": "blocks"},
    "distill": {"trajectories": "rows"},
    "trajectories import": {"source": "rows.parquet", "teacher": "tiny-llada"},
}
HOLDER = """
import sys, contextlib
from d3llm_ray.output_folder import writing
with contextlib.ExitStack() as stack:
    for output in sys.argv[1:]:
        stack.enter_context(writing(output))
    print("holding", flush=True)
    sys.stdin.read()
"""


def writing_verbs() -> list[str]:
    """Those that have an output; `inspect` draws pictures of what is there, each written as a whole."""
    return [v for v in VERBS if "output" in _load(VERBS[v].settings).model_fields and v != "trajectories inspect"]


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that writes to `DIR/VERB`, of every verb."""
    outputs = [str(tmp_path / "outputs" / verb) for verb in writing_verbs()]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *outputs], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None and process.stdout.readline() == b"holding\n"
    yield process
    process.kill()
    process.communicate()


def test_second_run_is_told_of_the_first_in_every_verb(holder: subprocess.Popen[bytes], tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    before = sorted(os.listdir(outputs))
    (tmp_path / "link").symlink_to(outputs)
    for verb in writing_verbs():
        run, cls = _load(VERBS[verb].run), _load(VERBS[verb].settings)
        settings = build(cls, {**NEEDED.get(verb, {}), "output": str(tmp_path / "link" / verb)})
        calls = [run, distil_here] if cls is DistillSettings else [run]
        for call in calls:
            with pytest.raises(InputError, match="^output: .* is being written by another run") as caught:
                call(settings)
            assert f"(process {holder.pid} on {socket.gethostname()})" in str(caught.value)
    assert sorted(os.listdir(outputs)) == before and all(name.startswith(".") for name in before)


def test_lock_ends_with_its_process_and_leaves_nothing(holder: subprocess.Popen[bytes], tmp_path: Path) -> None:
    output = tmp_path / "outputs" / "trajectories"
    holder.kill()
    holder.wait()
    with writing(output):
        assert len(os.listdir(output.parent)) == len(writing_verbs())  # killed: the files are there, the locks are not
    assert len(os.listdir(output.parent)) == len(writing_verbs()) - 1


def test_a_run_may_write_to_its_output_through_other_verbs_but_no_other_thread(tmp_path: Path) -> None:
    refused = []

    def other() -> None:
        try:
            with writing(tmp_path / "out"):
                pass
        except InputError as error:
            refused.append(str(error))

    with writing(tmp_path / "out"):
        with writing(f"{tmp_path}/./out"), writing(tmp_path / "out" / "student"):
            (tmp_path / "out" / "rows").write_text("")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(os.listdir(tmp_path)) == 2  # the outermost block holds it still
    assert len(refused) == 1 and f"process {os.getpid()} on" in refused[0]
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["rows"]


def test_a_run_that_writes_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "new" / "folder" / "out"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with writing(tmp_path / "new" / "folder" / ("n" * 255)):
        (tmp_path / "new" / "kept").write_text("")
    assert os.listdir(tmp_path / "new") == ["kept"]


@pytest.mark.parametrize("output", ["s3://bucket/out", "{tmp}/file/out", "{tmp}/out", "{tmp}/new/out", "nul\0"])
def test_where_no_lock_can_be_had_nothing_is_said(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(fcntl, "flock", unsupported)
    entered = False
    with writing(output.format(tmp=tmp_path)):
        entered = True
    assert entered and os.listdir(tmp_path) == ["file"]


def test_lock_file_that_its_holder_has_just_removed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two later runs would lock two files of one name."""
    flock, removed = fcntl.flock, []

    def after_removal(lock: int, operation: int) -> None:
        if not removed:
            (name,) = os.listdir(tmp_path)
            (tmp_path / name).unlink()
            removed.append(name)
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", after_removal)
    with writing(tmp_path / "out"):
        assert os.listdir(tmp_path) == removed
    assert os.listdir(tmp_path) == []
