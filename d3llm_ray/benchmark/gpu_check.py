"""The GPU check: everything that no GPU has run yet, part by part, so that calls of a few minutes complete it.

Each part leaves a JSON file; a later call on the same sources and device goes on with what is missing. Needs torch,
triton and transformers alone.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from d3llm_ray.benchmark import gpu_check_attention, gpu_check_engine, gpu_check_kernel, gpu_check_speed
from d3llm_ray.benchmark.gpu_check_base import CheckFailed, CheckPart, Target, Unavailable
from d3llm_ray.benchmark.gpu_check_report import GpuCheckReport, facts_of
from d3llm_ray.device import check_device, synchronise
from d3llm_ray.errors import require
from d3llm_ray.report import check_output, digest, write_text

DONE, FAILED, LEFT = 0, 1, 3  # exit codes; 2 is bad input
PASSED, SKIPPED, BROKEN = "passed", "skipped", "failed"
STARTED = ".started"  # ends the name of a part's file while it runs
MOST_TRIES = 2  # of a part that takes the process with it, or never ends


def all_parts(target: Target) -> list[CheckPart]:
    """What is proven first comes first: a wrong figure makes a fast one worthless."""
    return [
        *gpu_check_kernel.parts(),
        *gpu_check_engine.parts(target.quick),
        *gpu_check_attention.parts(),
        *gpu_check_speed.parts(target.quick),
    ]


def target_of(device: str, quick: bool) -> Target:
    """What to check; `InputError` where there is no such device, or a CPU is asked for the whole check."""
    check_device(device)
    target = Target(torch.device(device), quick)
    require(target.cuda or quick, "device", device, "cuda, or cpu with --quick (toy sizes, which prove nothing)")
    return target


@dataclass(frozen=True)
class Records:
    """The files of one folder. `key` names sources, device and sizes: records of others count as missing."""

    folder: Path
    key: str

    def read(self, part: CheckPart) -> dict[str, Any] | None:
        """The record of a part that has ended; what was skipped is tried again, as it may have been installed."""
        record = self._load(self.folder / f"{part.name}.json")
        return record if record is not None and record["status"] != SKIPPED else None

    def keep(self, part: CheckPart, record: dict[str, Any]) -> None:
        content = {"part": part.name, "section": part.section, "key": self.key, **record}
        write_text(self.folder / f"{part.name}.json", json.dumps(content, indent=1) + "\n")
        self._started(part).unlink(missing_ok=True)

    def tries(self, part: CheckPart) -> int:
        """Calls that have begun the part and not ended it."""
        return int((self._load(self._started(part)) or {"tries": 0})["tries"])

    def begin(self, part: CheckPart) -> None:
        write_text(self._started(part), json.dumps({"key": self.key, "tries": self.tries(part) + 1}))

    def of(self, parts: Sequence[CheckPart]) -> list[dict[str, Any]]:
        """Every record of today's key, in the parts' order."""
        loaded = (self._load(self.folder / f"{part.name}.json") for part in parts)
        return [record for record in loaded if record is not None]

    def _started(self, part: CheckPart) -> Path:
        return self.folder / f"{part.name}{STARTED}"

    def _load(self, path: Path) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return content if content.get("key") == self.key else None


def run_parts(
    parts: Sequence[CheckPart],
    target: Target,
    records: Records,
    limit_s: float,
    *,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> list[CheckPart]:
    """Run what is missing, as far as it fits into `limit_s` seconds; returns what is left.

    What has ended a process before comes last, and has failed after `MOST_TRIES`. A device that no longer answers ends
    the call: only a new process gets it back.
    """
    began, ran = clock(), 0
    missing = sorted((part for part in parts if records.read(part) is None), key=records.tries)
    left: list[CheckPart] = []
    for number, part in enumerate(missing):
        if ran and clock() - began + part.estimate_s > limit_s:
            left.append(part)
            continue
        if records.tries(part) >= MOST_TRIES:
            record = {"status": BROKEN, "reason": f"ended the process, or ran past the limit, {MOST_TRIES} times"}
        else:
            records.begin(part)
            record = _run(part, target, clock)
            ran += record["status"] != SKIPPED
        records.keep(part, record)
        say(f"{part.name}: {record['status']}{' - ' + record['reason'] if record.get('reason') else ''}")
        if not _answers(target.device):
            say("the device no longer answers: the next call goes on")
            return [*left, *missing[number + 1 :]]
    return left


def check(device: str, *, quick: bool, output: Path, limit_s: float, again: bool = False) -> int:
    """Run the check, or the rest of it; returns the exit code.

    `again` forgets what has failed. Writes `gpu_check.json` and `gpu_check.md` to `output`, of the parts so far.

    Raises:
        InputError: no such device; an output folder that holds something else.
    """
    target = target_of(device, quick)
    facts, parts = facts_of(target), all_parts(target)
    _check_folder(output, parts)
    output.mkdir(parents=True, exist_ok=True)
    records = Records(output, digest([facts["sources"], facts["card"], quick]))
    if again:
        for record in records.of(parts):
            if record["status"] == BROKEN:
                (output / f"{record['part']}.json").unlink()
    left = run_parts(parts, target, records, limit_s)
    report = GpuCheckReport(facts, tuple(records.of(parts)), tuple(part.name for part in left))
    write_text(output / "gpu_check.md", report.to_markdown())
    write_text(output / "gpu_check.json", report.to_json() + "\n")
    failed = [record["part"] for record in report.parts if record["status"] == BROKEN]
    print(f"{output / 'gpu_check.md'}: {len(report.parts)} parts, {len(failed)} failed, {len(left)} left")
    if left:
        print("parts are left: run the same command again")
        return LEFT
    return FAILED if failed else DONE


def _check_folder(output: Path, parts: Sequence[CheckPart]) -> None:
    names = {path.name for path in check_output(output, "output", folder=True).glob("[!.]*")}
    begun = any(f"{part.name}{suffix}" in names for part in parts for suffix in (".json", STARTED))
    require(begun or not names, "output", str(output), "an empty folder, or that of an earlier check")


def _run(part: CheckPart, target: Target, clock: Callable[[], float]) -> dict[str, Any]:
    """The part's record. Whatever goes wrong in it is a finding, and stops no other part."""
    began = clock()
    try:
        outcome: dict[str, Any] = {"status": PASSED, "figures": dict(part.run(target))}
    except Unavailable as error:
        outcome = {"status": SKIPPED, "reason": str(error)}
    except CheckFailed as error:
        outcome = {"status": BROKEN, "reason": str(error), "figures": dict(error.figures)}
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        outcome = {"status": BROKEN, "reason": f"{type(error).__name__}: {first}"}
    gc.collect()
    if target.cuda:
        with suppress(RuntimeError):  # of a device that is lost; `_answers` tells
            torch.cuda.empty_cache()
    return {**outcome, "seconds": round(clock() - began, 1), "date": datetime.now(UTC).isoformat(timespec="seconds")}


def _answers(device: torch.device) -> bool:
    """False after an illegal access, say, which every later call would report again."""
    try:
        synchronise(device)
    except RuntimeError:
        return False
    return True
