from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from d3llm_ray.config import build, read_yaml
from d3llm_ray.errors import IncompleteError, InputError
from d3llm_ray.progress import Progress
from d3llm_ray.trajectories import read_metadata, read_trajectories
from d3llm_ray.trajectories.pipeline import run
from d3llm_ray.trajectories.plan import make_plan
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.teacher import Teacher

pytestmark = pytest.mark.usefixtures("ray_cluster")
BASE = {"count": 40, "max_tokens": 32, "attempts": 2, "rows_per_block": 16, "max_batch_size": 5}


def settings(checkpoint: Path, output: Path, **values: Any) -> TrajectorySettings:
    return build(TrajectorySettings, {**BASE, "teacher": str(checkpoint), "output": str(output), **values})


class Recorder(Progress):
    """Keeps what the display is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.stages: list[tuple[str, int | None, str]] = []
        self.done: list[int] = []

    def start(self, stage: str, total: int | None, unit: str = "row") -> None:
        self.stages.append((stage, total, unit))

    def update(self, done: int, **figures: float | int | str) -> None:
        self.done.append(done)


def expected_rows(chosen: TrajectorySettings) -> list[dict[str, Any]]:
    """The rows of one teacher in this process that decodes one prompt after another, as Parquet keeps them."""
    single = chosen.model_copy(update={"max_batch_size": 1})
    plan = make_plan(single)
    teacher = Teacher(single, plan.source.task)
    rows = [row for prompt in plan.prompts() for row in teacher.rows([prompt])]
    for row in rows:
        del row["row"]  # of the staged rows only
        row["reference_ids"] = None  # of imported rows only
        row["temperature"] = float(np.float32(row["temperature"]))
        row["reveal_entropy"] = [float(np.float16(value)) for value in row["reveal_entropy"]]
    return rows


def assert_same_rows(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Bit for bit but for the entropies: another batch shape may round a sum of the softmax differently."""
    assert [row["prompt_id"] for row in found] == [row["prompt_id"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.pop("reveal_entropy") == pytest.approx(other.pop("reveal_entropy"), rel=2e-3, abs=2e-3)
        assert one == other


def test_two_actors_write_the_rows_of_a_sequential_teacher(tiny_checkpoint: Path, tmp_path: Path) -> None:
    chosen, recorder = settings(tiny_checkpoint, tmp_path / "out"), Recorder()
    folder = Path(run(chosen, recorder))
    table = read_trajectories(folder)
    assert_same_rows(table.to_pylist(), expected_rows(chosen))
    names = {path.name for path in folder.iterdir()}
    assert names == {"_SUCCESS", "settings.yaml", "summary.json", "trajectories-00000.parquet"}
    assert read_metadata(folder)["teacher"] == str(tiny_checkpoint)
    assert build(TrajectorySettings, read_yaml(folder / "settings.yaml")) == chosen
    summary = json.loads((folder / "summary.json").read_text())
    judged = [row["is_correct"] for row in table.to_pylist()]
    assert (summary["rows"], summary["correct"], summary["errors"]) == (40, sum(judged), 0)
    assert summary["bytes_per_row"] <= 2000
    assert [stage for stage, _, _ in recorder.stages] == ["prompts", "trajectories", "publish"]
    decoding = recorder.done[1:-1]
    assert decoding == sorted(decoding) and decoding[-1] == 40 and {total for _, total, _ in recorder.stages} == {40}

    modified = (folder / "trajectories-00000.parquet").stat().st_mtime_ns
    assert run(chosen, recorder) == str(folder)  # finished: nothing is decoded again
    assert (folder / "trajectories-00000.parquet").stat().st_mtime_ns == modified
    with pytest.raises(InputError, match="a finished run of other prompts or settings"):
        run(settings(tiny_checkpoint, folder, seed=1))


def poisoned(path: Path, bad: int, total: int = 40) -> str:
    lines = [{"prompt": "apples " * 300 if n < bad else "Tom has apples.", "reference": str(n)} for n in range(total)]
    for number, line in enumerate(lines):
        line |= {"prompt": f"{line['prompt']} {number}", "id": f"p{number}"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_poison_prompts_are_listed_and_the_run_goes_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts = poisoned(tmp_path / "prompts.jsonl", bad=2)
    chosen = settings(tiny_checkpoint, tmp_path / "out", prompts=prompts, count=None, attempts=1)
    folder = tmp_path / "out"
    with pytest.raises(IncompleteError, match=r"^prompts: 2 of 40 gave no trajectory .*: row 1 \(p0\): .*; row 2 "):
        run(chosen, Progress(quiet=True))
    errors = pq.read_table(folder / "errors.parquet").to_pylist()
    assert [(error["row"], error["messages"][0]["content"][-4:]) for error in errors] == [(0, "s  0"), (1, "s  1")]
    assert all("exceed the model's context" in error["error"] for error in errors)
    rows = read_trajectories(folder).to_pylist()
    assert [row["reference"] for row in rows] == [str(number) for number in range(2, 40)]
    assert [row["id"] for row in [*errors, *rows]] == [f"p{number}" for number in range(40)]


def test_too_many_poison_prompts_stop_the_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts = poisoned(tmp_path / "prompts.jsonl", bad=5)
    with pytest.raises(InputError, match=r"^prompts: [345] of 40 gave no trajectory, .* at most 5% "):
        run(settings(tiny_checkpoint, tmp_path / "out", prompts=prompts, count=None), Progress(quiet=True))
    assert not (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.slow
def test_teacher_that_cannot_be_loaded_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Weights are read by the actors only: their complaint must reach the caller as the one line it was."""
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.transformer.ln_f.weight"]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(InputError) as caught:
        run(settings(broken, tmp_path / "out"), Progress(quiet=True))
    assert "missing tensor" in str(caught.value) and "model.transformer.ln_f.weight" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cluster_without_room_is_named_in_time(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Ray would wait for ever: what is demanded, and what is free, are said instead."""
    for change, words in (
        ({"actors": 8}, "9 CPU (8 CPU free of 8 CPU)"),
        ({"gpus_per_actor": 1.0}, "2 GPU (0 GPU free of 0 GPU)"),
    ):
        started = time.monotonic()
        with pytest.raises(InputError, match="actors: the cluster did not give within 1 s: ") as caught:
            run(settings(tiny_checkpoint, tmp_path / "out", resource_timeout_s=1.0, **change), Progress(quiet=True))
        assert words in str(caught.value)
        assert time.monotonic() - started < 20
    assert TrajectorySettings().resource_timeout_s < 120
