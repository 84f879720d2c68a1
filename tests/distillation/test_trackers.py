"""Where a step's figures go: the metrics file, TensorBoard's event files, Ray's metrics."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from ray.util.metrics import Counter as RayCounter
from ray.util.metrics import Metric
from tensorboardX.proto.event_pb2 import Event, SessionLog

from d3llm_ray.distillation.training.metrics_file import MetricsFile, read_metrics
from d3llm_ray.distillation.training.trackers import TensorBoard, run_tracker
from d3llm_ray.metrics import DistillMetrics

LINE = {"step": 1, "epoch": 0, "window": 16, "noise_floor": 0.0, "lr": 0.5, "loss": 2.0, "ce": 1.5, "mask_ratio": 0.25}
LINE |= {"grad_norm": 3.0, "tokens_per_second": 640.0, "memory_gib": 0.5, "val_loss": 4.0, "val_tpf": 2.5}


def events(folder: Path) -> list[Event]:
    """All events in the order in which TensorBoard reads them: file by file, by name (TFRecord framing)."""
    events = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return events


def shown(folder: Path) -> dict[str, dict[int, list[float]]]:
    """Tag to step to values after TensorBoard's purge: a restart at step S forgets what was before it from S on."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            for steps in values.values():
                for step in [step for step in steps if step >= event.step]:
                    del steps[step]
        for value in event.summary.value:
            values[value.tag][event.step].append(value.simple_value)
    return values


def test_metrics_file_drops_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(1, 6):
        file.log({"step": step, "loss": 1 / step})
    file.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')  # killed while writing
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]
    file = MetricsFile(path, 3)
    file.log({"step": 4, "loss": 0.5})
    file.close()
    assert read_metrics(path)[2:] == [{"step": 3, "loss": 0.333333}, {"step": 4, "loss": 0.5}]


def test_tensorboard_groups_every_figure(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, 0)
    board.log({**LINE, "note": "text"})
    board.close()
    assert {tag: values[1] for tag, values in shown(tmp_path).items()} == {
        "curriculum/epoch": [0.0],
        "curriculum/window": [16.0],
        "curriculum/noise_floor": [0.0],
        "curriculum/lr": [0.5],
        "curriculum/mask_ratio": [0.25],
        "loss/loss": [2.0],
        "loss/ce": [1.5],
        "loss/grad_norm": [3.0],
        "speed/tokens_per_second": [640.0],
        "speed/memory_gib": [0.5],
        "val/loss": [4.0],
        "val/tpf": [2.5],
    }


def test_a_resumed_run_shows_every_step_once(tmp_path: Path) -> None:
    for done, last, loss in ((0, 5, 1.0), (3, 6, 2.0), (3, 8, 3.0)):
        board = TensorBoard(tmp_path, done)
        for step in range(done + 1, last + 1):
            board.log({"step": step, "loss": loss})
        board.close()
    expected = {step: [1.0 if step <= 3 else 3.0] for step in range(1, 9)}
    assert shown(tmp_path)["loss/loss"] == expected


def test_ray_series_carry_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    values: Counter[tuple[str, ...]] = Counter()

    def record(metric: Metric, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(metric.info["tag_keys"])
        key = (metric.info["name"].removeprefix("d3llm_distill_"), *tags.values())
        values[key] = value + (values[key] if isinstance(metric, RayCounter) else 0)

    monkeypatch.setattr(Metric, "_record", record)
    metrics = DistillMetrics("tiny", done=10)
    metrics.log({"step": 15, "loss": 2.0, "ce": 1.5, "note": "text", "steps_per_second": 4.0, "val_accuracy": 50.0})
    metrics.log({"step": 20, "loss": 1.0, "ce": 0.5, "steps_per_second": 5.0})
    running = {
        ("steps", "tiny"): 10,  # 11 to 20
        ("step", "tiny"): 20,
        ("loss", "tiny"): 1.0,
        ("figure", "tiny", "ce"): 0.5,
        ("steps_per_second", "tiny"): 5.0,
        ("val_accuracy", "tiny"): 50.0,
    }
    assert dict(values) == running
    metrics.close()
    assert dict(values) == running | {(f"{name}_per_second", "tiny"): 0.0 for name in ("samples", "tokens", "steps")}


def test_a_run_without_ray_is_tracked_in_files(tmp_path: Path) -> None:
    """In a process that cannot import Ray."""
    program = f"""
import sys
sys.modules["ray"] = None
from pathlib import Path
from d3llm_ray.distillation.training.trackers import run_tracker
tracker = run_tracker(Path({str(tmp_path)!r}), 0, student="tiny", ray=False)
tracker.log({{"step": 1, "loss": 0.5}})
tracker.close()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    assert shown(tmp_path / "tensorboard")["loss/loss"] == {1: [0.5]}


def test_a_run_on_a_cluster_is_tracked_in_rays_metrics_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    students = []
    monkeypatch.setattr(Metric, "_record", lambda metric, value, tags: students.append(tags["student"]))
    tracker = run_tracker(tmp_path, 4, student="tiny")
    tracker.log({"step": 5, "loss": 0.5})
    tracker.close()
    assert set(students) == {"tiny"}
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 5, "loss": 0.5}]
