"""Where the figures of a step go: `metrics.jsonl`, TensorBoard event files and, on a cluster, Ray's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tensorboardX import SummaryWriter

from d3llm_ray.distillation.objectives import OBJECTIVES
from d3llm_ray.distillation.training.metrics_file import METRICS_FILE, MetricsFile

Line = Mapping[str, float | int | str]

TENSORBOARD = "tensorboard"
VALIDATION = "val_"  # prefix of the figures of a validation
CURRICULUM = (
    *("epoch", "mask_ratio", "lr"),
    *(name for objective in OBJECTIVES.values() for name in objective.scheduled),
)
SPEED = ("samples_per_second", "tokens_per_second", "steps_per_second", "memory_gib")

_FLUSH_S = 1  # so much is missing at most from the curves of a worker that was killed


class Tracker(Protocol):
    """Takes the lines of a run; a line holds the finished `step` (1-based) and its figures by name."""

    def log(self, line: Line) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Several trackers as one."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log(self, line: Line) -> None:
        for tracker in self._trackers:
            tracker.log(line)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class TensorBoard:
    """Event files that a resumed run continues: TensorBoard drops what they hold from after step `done`."""

    def __init__(self, folder: Path, done: int) -> None:
        # The suffix keeps two files apart that are opened within a second.
        self._writer = SummaryWriter(str(folder), purge_step=done + 1, filename_suffix=f".{done}", flush_secs=_FLUSH_S)

    def log(self, line: Line) -> None:
        for name, value in line.items():
            if name != "step" and not isinstance(value, str):
                self._writer.add_scalar(tag(name), value, int(line["step"]))

    def close(self) -> None:
        self._writer.close()


def tag(name: str) -> str:
    """TensorBoard's name for a figure, in one of the groups val, curriculum, speed and loss."""
    if name.startswith(VALIDATION):
        return f"val/{name.removeprefix(VALIDATION)}"
    group = "curriculum" if name in CURRICULUM else "speed" if name in SPEED else "loss"
    return f"{group}/{name}"


def run_tracker(folder: Path, done: int, *, student: str, ray: bool = True) -> Tracker:
    """Track a run in its work folder, behind step `done`; with `ray` also as Ray's metrics, tagged `student`.

    For the first worker only: the files have one writer.
    """
    files = (MetricsFile(folder / METRICS_FILE, done), TensorBoard(folder / TENSORBOARD, done))
    if not ray:
        return Trackers(*files)
    from d3llm_ray.metrics import DistillMetrics  # imports Ray, which a run in this process does without

    return Trackers(*files, DistillMetrics(student, done))
