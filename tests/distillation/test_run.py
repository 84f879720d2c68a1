"""The whole room on Ray: two CPU workers over gloo, ZeRO-2, LoRA."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from d3llm_ray.config import build, read_yaml
from d3llm_ray.distillation import run as distill
from d3llm_ray.distillation.local import distil_here
from d3llm_ray.distillation.objectives import LossModule
from d3llm_ray.distillation.plan import TrainingPlan
from d3llm_ray.distillation.preparation import load
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.student import student_family
from d3llm_ray.distillation.training.metrics_file import read_metrics
from d3llm_ray.errors import InputError
from d3llm_ray.models import load_model, read_configs
from d3llm_ray.progress import Progress
from tests.distillation.rows import SMALL_RUN

STEPS = 60


class Recorder(Progress):
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.stages: list[tuple[str, int | None]] = []
        self.done: list[int] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, stage: str, total: int | None, unit: str = "row") -> None:
        self.stages.append((stage, total))

    def update(self, done: int, **figures: float | int | str) -> None:
        assert "loss" in figures
        self.done.append(done)


@pytest.fixture(scope="module")
def rows(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, write_trajectories: Callable[..., Path]
) -> Path:
    _, family = read_configs(tiny_checkpoint)
    folder = tmp_path_factory.mktemp("trajectories")
    return write_trajectories(folder, rows=100, canvas=32, vocab_size=4, mask_token_id=family.mask_token_id)


def settings_of(teacher: Path, rows: Path, output: Path, **values: Any) -> DistillSettings:
    defaults = {
        "teacher": str(teacher),
        "trajectories": str(rows),
        "output": str(output),
        **SMALL_RUN,
        "max_steps": STEPS,
        "save_adapter": True,
    }
    return build(DistillSettings, defaults | values)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, rows: Path) -> DistillSettings:
    return settings_of(tiny_checkpoint, rows, tmp_path_factory.mktemp("students") / "student")


@pytest.fixture(scope="module")
def progress() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def student(settings: DistillSettings, progress: Recorder, ray_cluster: None) -> Path:
    return distill.run(settings, progress)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def test_training_lowers_the_loss(student: Path, progress: Recorder) -> None:
    lines = read_metrics(student / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    first, last = (sum(line["ce"] for line in part) / 10 for part in (lines[:10], lines[-10:]))
    assert last < 0.5 * first
    assert {"loss", "ce", "complement", "certainty", "right", "mask_ratio", "window", "lr"} <= lines[0].keys()
    assert {"grad_norm", "samples_per_second", "tokens_per_second", "memory_gib"} <= lines[0].keys()
    assert progress.notes[0].endswith(" rows to train on; left out: 33 wrong")
    assert "LoRA rank 8" in progress.notes[1] and "memory plan of each of 2 workers" in progress.notes[1]
    assert 0 < min(line["mask_ratio"] for line in lines) < max(line["mask_ratio"] for line in lines) < 1
    assert progress.stages == [("distill", STEPS)]
    assert progress.done[-1] == STEPS


def test_first_loss_is_the_teachers(student: Path, settings: DistillSettings) -> None:
    """New adapters add nothing: the first logged loss is the frozen teacher's, computed here without Ray."""
    model, family = load_model(settings.teacher)
    samples, _ = load(settings, *student_family(settings))
    plan = TrainingPlan(settings, samples, family)
    module = LossModule(model, plan.objective, head_rows=10_000, autocast=False)
    with torch.no_grad():
        values = [module(module.batch(plan.micro_batch(n), torch.device("cpu")))[0].item() for n in (0, 1)]
    assert losses(student)[0] == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_student_is_a_checkpoint_whose_other_tensors_are_the_teachers(student: Path, settings: DistillSettings) -> None:
    teacher, trained = load_model(settings.teacher)[0].state_dict(), load_model(student)[0].state_dict()
    assert teacher.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(tensor, teacher[name]) != name.endswith("_proj.weight"), name
    names = {file.name for file in student.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "settings.yaml", "metrics.jsonl", "loss.png"} <= names
    assert build(DistillSettings, read_yaml(student / "settings.yaml")) == settings
    assert [file.name for file in student.parent.iterdir()] == ["student"]  # nothing else is left behind


def test_adapter_on_the_teacher_is_the_student(student: Path, settings: DistillSettings) -> None:
    model = PeftModel.from_pretrained(load_model(settings.teacher)[0], str(student / "adapter")).merge_and_unload()
    merged = load_model(student)[0].state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name])


def test_a_finished_run_returns_at_once_and_other_settings_are_refused(
    student: Path, settings: DistillSettings
) -> None:
    before = (student / "model.safetensors").stat().st_mtime_ns
    started = time.monotonic()
    assert distill.run(settings) == student
    assert time.monotonic() - started < 1
    assert (student / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"output: .* exists"):
        distill.run(settings.model_copy(update={"lr": 1e-3}))


def test_more_workers_than_the_cluster_has_are_refused_in_time(
    settings: DistillSettings, tmp_path: Path, ray_cluster: None
) -> None:
    for many, demand in (
        ({"workers": 2, "cpus_per_actor": 5}, r"10 CPU \(8 CPU free of 8 CPU\)"),
        ({"workers": 2, "device": "cuda"}, r"2 GPU \(0 GPU free of 0 GPU\)"),
    ):
        changed = {"output": str(tmp_path / "s"), "resource_timeout_s": 1.0, **many}
        with pytest.raises(InputError, match=f"workers: the cluster did not give within 1 s: .*{demand}"):
            distill.run(settings.model_copy(update=changed), Recorder())


def test_one_process_without_ray_trains_the_same_student_as_two_workers(
    student: Path, settings: DistillSettings, tmp_path: Path
) -> None:
    alone = distil_here(settings.model_copy(update={"output": str(tmp_path / "alone")}), Recorder())
    assert losses(alone) == pytest.approx(losses(student), rel=1e-5)
    for name, tensor in load_model(alone)[0].state_dict().items():
        torch.testing.assert_close(tensor, load_model(student)[0].state_dict()[name], rtol=1e-4, atol=1e-5)
