"""The trajectory job at scale, with a teacher that sleeps instead of decoding: what everything but the model costs.

    python tests/trajectories/scale.py --count 100000 [--actors 16] [--rows-per-block 64] [--resume]

Prints one line of JSON: seconds and rows a second of every stage and the driver's peak memory; with `--resume` the
driver is killed when nine tenths of the rows are committed, and the line also tells how long the next driver needs
until an actor works again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d3llm_ray.config import build
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import Task
from d3llm_ray.trajectories.pipeline import run
from d3llm_ray.trajectories.prompts import Prompt
from d3llm_ray.trajectories.settings import TrajectorySettings

CANVAS, VOCABULARY = 64, 126_464
FIRST_WORK = "first-work"  # beside the output: when an actor of this driver got its first prompts


class SleepingTeacher:
    """Completes its whole batch after a tenth of a second; rows are random but a function of their prompt."""

    def __init__(self, settings: TrajectorySettings, task: Task) -> None:
        self._size, self._mark = settings.max_batch_size, Path(settings.output).parent / FIRST_WORK
        self._queue: list[Prompt] = []

    @property
    def active(self) -> int:
        return min(self._size, len(self._queue))

    @property
    def waiting(self) -> int:
        return len(self._queue) - self.active

    def submit(self, prompts: Sequence[Prompt]) -> None:
        if prompts and not self._mark.exists():
            self._mark.touch()
        self._queue += prompts

    def step(self) -> list[dict[str, Any]]:
        done, self._queue = self._queue[: self._size], self._queue[self._size :]
        time.sleep(0.1)
        return [random_row(prompt) for prompt in done]


def random_row(prompt: Prompt) -> dict[str, Any]:
    rng = random.Random(prompt.prompt_id)
    return {
        "row": prompt.row,
        "prompt_id": prompt.prompt_id,
        "messages": prompt.messages,
        "prompt_ids": [rng.randrange(VOCABULARY) for _ in range(16)],
        "response_ids": [rng.randrange(VOCABULARY) for _ in range(CANVAS)],
        "reveal_step": rng.sample(range(CANVAS), CANVAS),
        "reveal_entropy": [rng.random() for _ in range(CANVAS)],
        "attempt": 0,
        "temperature": 0.0,
        "forwards": CANVAS,
        "is_correct": None,
        "seed": 0,
    }


class Stopwatch(Progress):
    """Takes the time of every stage."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "", 0.0

    def start(self, stage: str, total: int | None, unit: str = "row") -> None:
        super().start(stage, total, unit)
        self._stage, self._since = stage, time.perf_counter()

    def finish(self) -> None:
        if self._stage:
            self.seconds[self._stage] = round(time.perf_counter() - self._since, 1)
            self._stage = ""
        super().finish()


def write_prompts(file: Path, count: int) -> None:
    def batches() -> Iterator[pa.Table]:
        for first in range(0, count, 50_000):
            numbers = range(first, min(count, first + 50_000))
            yield pa.table({"prompt": [f"Question {number}: how many apples are left?" for number in numbers]})

    with pq.ParquetWriter(file, pa.schema([("prompt", pa.string())])) as writer:
        for batch in batches():
            writer.write_table(batch)


def drive(folder: Path, actors: int, rows_per_block: int) -> None:
    """One driver: run the job to its end and print what it took."""
    values = {"prompts": str(folder / "prompts.parquet"), "output": str(folder / "out"), "actors": actors}
    values |= {"rows_per_block": rows_per_block, "max_batch_size": rows_per_block // 2}
    stopwatch = Stopwatch()
    run(build(TrajectorySettings, values), stopwatch, SleepingTeacher)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    summary = json.loads((folder / "out" / "summary.json").read_text())
    figures = {"stages_s": stopwatch.seconds, "driver_peak_gb": round(peak / 1e9, 2), **summary}
    print(json.dumps(figures))


def measure(count: int, actors: int, rows_per_block: int, resume: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder / "prompts.parquet", count)
        command = [sys.executable, __file__, "--drive", name]
        command += [f"--actors={actors}", f"--rows-per-block={rows_per_block}"]
        figures: dict[str, Any] = {"count": count, "actors": actors, "rows_per_block": rows_per_block}
        if resume:
            driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
            parts, enough = folder / "out" / "_staging" / "parts", 0.9 * count / (rows_per_block // 2)
            while driver.poll() is None and count_files(parts) < enough:
                time.sleep(1)
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            (folder / FIRST_WORK).unlink()
            time.sleep(10)  # Ray's processes notice that their driver is gone
        started = time.time()
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        last = next(line for line in printed if line.startswith("{"))  # among what Ray says at its end
        figures["first_work_s"] = round((folder / FIRST_WORK).stat().st_mtime - started, 1)
        figures["total_s"] = round(time.time() - started, 1)
        return figures | json.loads(last)


def count_files(folder: Path) -> int:
    return len(os.listdir(folder)) if folder.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--actors", type=int, default=16)
    parser.add_argument("--rows-per-block", type=int, default=64)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.drive:
        drive(chosen.drive, chosen.actors, chosen.rows_per_block)
    else:
        print(json.dumps(measure(chosen.count, chosen.actors, chosen.rows_per_block, chosen.resume)))


if __name__ == "__main__":
    main()
