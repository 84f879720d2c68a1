"""Answers on their way to a batch's output: kept as they come, and put in order when all are there.

While a batch runs its answers are lines of a hidden file beside the output, each written by one call and synced within
a second. A run that is killed loses at most those that were under way; the next one goes on from the file. When none is
missing they are copied in the order of the requests, and the output gets its name.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3llm_ray.clients.batch_input import InputSummary
from d3llm_ray.errors import NAMED, InputError
from d3llm_ray.report import check_output, digest, json_line, replacing, storing, write_text

SYNC_S = 1.0
ABSENT = -1
_MADE_BY = "d3llm-ray batch"


@dataclass(frozen=True)
class Finished:
    """What a finished batch says of itself."""

    requests: int
    failed: int
    failures: list[str]  # the first few


def record_file(output: Path) -> Path:
    """Where it stands whose answers an output holds."""
    return output.with_name(f"{output.name}.batch.json")


def partial_file(output: Path) -> Path:
    """Where answers are until all are there; the same name in every run."""
    return output.with_name(f".{output.name[:40]}.{digest(output.name)}.unfinished")


class BatchOutput:
    """The answers of one batch. `identity`: what must be the same in a run that goes on."""

    def __init__(self, path: Path, source: InputSummary, settings: dict[str, Any]) -> None:
        self._given = path
        self._path = check_output(path, "output")
        self._identity = {
            "made_by": _MADE_BY,
            "requests": source.requests,
            "input": source.sha256,
            "settings": settings,
        }
        self._offsets = array("q", [ABSENT]) * source.requests
        self._descriptor = -1
        self._end = 0
        self._synced = time.monotonic()

    @property
    def missing(self) -> int:
        """Requests without an answer."""
        return self._offsets.count(ABSENT)

    def has(self, index: int) -> bool:
        return self._offsets[index] != ABSENT

    def finished(self) -> Finished | None:
        """What an earlier run has left as a whole; `InputError` for an output of another batch, or of nobody's."""
        record = _read_json(record_file(self._path))
        if self._path.exists():
            self._require_same(record, self._path)
            return Finished(record["requests"], record["failed"], record["failures"])
        if record_file(self._path).exists() and record.get("made_by") != _MADE_BY:
            raise self._refusal(f"{str(record_file(self._given))!r} would be overwritten, which no run has written")
        return None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Take up what an earlier run has kept, and keep answers while the block runs."""
        file = partial_file(self._path)
        with storing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            with storing(self._path):
                self._take_up(file)
            try:
                yield
            finally:
                if self.missing == len(self._offsets):  # a run that has kept nothing leaves nothing
                    file.unlink()
            with storing(self._path):
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def add(self, index: int, line: dict[str, Any], failure: str | None) -> None:
        """Keep the answer to request `index`; `failure` is the reason why it is none."""
        mark = "ok" if failure is None else json.dumps(failure)
        with storing(self._path):
            self._offsets[index] = self._end
            self._append(f"{index}\t{mark}\t{json_line(line)}\n".encode())
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(self._descriptor)
                self._synced = time.monotonic()

    def finish(self) -> Finished:
        """Put all answers in order under the output's name."""
        failed, failures = 0, []
        with replacing(self._path) as whole, whole.open("wb") as ordered, partial_file(self._path).open("rb") as kept:
            for offset in self._offsets:
                kept.seek(offset)
                _, mark, line = kept.readline().split(b"\t", 2)
                ordered.write(line)
                if mark != b"ok":
                    failed += 1
                    failures += [json.loads(mark)] if failed <= NAMED else []
            ordered.flush()
            os.fsync(ordered.fileno())
            counts = {"failed": failed, "failures": failures}
            write_text(record_file(self._path), json_line(self._identity | counts) + "\n")
        partial_file(self._path).unlink()
        return Finished(len(self._offsets), failed, failures)

    def clear(self) -> None:
        """Remove what a run that was killed at its very end has left beside a finished output."""
        partial_file(self._path).unlink(missing_ok=True)

    def _append(self, line: bytes) -> None:
        written = os.pwrite(self._descriptor, line, self._end)
        while written < len(line):  # a full disk: the next call says so
            written += os.pwrite(self._descriptor, line[written:], self._end + written)
        self._end += len(line)

    def _take_up(self, file: Path) -> None:
        """Find the whole lines that are there, and cut off what is torn."""
        with file.open("rb") as lines:
            head = lines.readline()
            if head.endswith(b"\n"):
                self._require_same(_parsed(head), file)
                self._end = len(head)
                while self._is_answer(line := lines.readline()):
                    self._offsets[int(line.partition(b"\t")[0])] = self._end
                    self._end += len(line)
        os.ftruncate(self._descriptor, self._end)
        if self._end == 0:
            self._append(json_line(self._identity).encode() + b"\n")
            os.fsync(self._descriptor)

    def _is_answer(self, line: bytes) -> bool:
        parts = line.split(b"\t", 2)
        if not line.endswith(b"\n") or len(parts) < 3 or not parts[0].isdigit():
            return False
        return int(parts[0]) < len(self._offsets) and bool(_parsed(parts[2]))

    def _require_same(self, found: dict[str, Any], file: Path) -> None:
        if found.get("made_by") != _MADE_BY:
            raise self._refusal(f"{str(file)!r} holds something else")
        changed = [name for name in ("input", "settings") if found.get(name) != self._identity[name]]
        if changed:
            raise self._refusal(f"there are answers with another {' and other '.join(changed)} in {str(file)!r}")

    def _refusal(self, reason: str) -> InputError:
        accepted = "a name that is free, or the output of the same batch"
        return InputError(f"output: got {str(self._given)!r}; accepted: {accepted}; {reason}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return _parsed(file.read_bytes())
    except OSError:
        return {}


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
