"""A whole run in one process: validation, selection, resuming, and stopping for good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d3llm_ray.config import build
from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.distillation.local import distil_here
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.training import job
from d3llm_ray.distillation.training.loop import NotFiniteError
from d3llm_ray.distillation.training.metrics_file import read_metrics
from d3llm_ray.distillation.training.validation import score
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.evaluate import evaluate
from d3llm_ray.models import load_model, read_configs
from d3llm_ray.tasks import load_task
from tests.wiring import Notes

STEPS = 12


@pytest.fixture(scope="module")
def rows(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, write_trajectories: Callable[..., Path]
) -> Path:
    _, family = read_configs(tiny_checkpoint)
    folder = tmp_path_factory.mktemp("trajectories")
    return write_trajectories(folder, rows=60, canvas=32, vocab_size=4, mask_token_id=family.mask_token_id)


@pytest.fixture
def settings(tiny_checkpoint: Path, rows: Path, tmp_path: Path) -> Callable[..., DistillSettings]:
    def make(output: str, **values: Any) -> DistillSettings:
        given = {
            "teacher": str(tiny_checkpoint),
            "trajectories": str(rows),
            "output": str(tmp_path / output),
            "epochs": 100,
            "max_steps": STEPS,
            "objective": {"window_sizes": [8, 16]},
            "batch_size": 8,
            "micro_batch_size": 4,
            "workers": 1,
            "lr": 1e-2,
            "lora_rank": 4,
            "precision": "float32",
            "checkpoint_every": 5,
        }
        return build(DistillSettings, {**given, **values})

    return make


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def stop_behind(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next run end like a killed one, when it has logged `step`."""
    original = job.train

    def train(engine: Any, module: Any, plan: Any, batches: Any, done: int, hooks: Any, device: Any) -> None:
        def log(line: Any) -> None:
            hooks.log(line)
            if line["step"] == step:
                raise KeyboardInterrupt

        original(engine, module, plan, batches, done, job.Hooks(log, hooks.save, hooks.validate), device)

    monkeypatch.setattr(job, "train", train)


@pytest.mark.parametrize("objective", ["windows", "d2f"])
def test_an_interrupted_run_goes_on_to_the_same_student(
    settings: Callable[..., DistillSettings], monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    values = {"objective": objective, "lora_dropout": 0.1}  # dropout is drawn from the step as well
    whole = distil_here(settings("whole", **values), Notes())
    with monkeypatch.context() as patch:
        stop_behind(8, patch)
        with pytest.raises(KeyboardInterrupt):
            distil_here(settings("parts", **values), Notes())
    progress = Notes()
    parts = distil_here(settings("parts", checkpoint_every=3, **values), progress)  # how it is run may change
    assert progress.said[0] == "40 rows to train on; left out: 20 wrong"
    assert f"resuming behind step 5 of {STEPS}" in progress.said
    assert losses(parts) == losses(whole)
    assert [line["step"] for line in read_metrics(parts / "metrics.jsonl")] == list(range(1, STEPS + 1))
    for name, tensor in load_model(parts)[0].state_dict().items():
        assert torch.equal(tensor, load_model(whole)[0].state_dict()[name]), name
    assert not list(parts.parent.glob(".*"))


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(
    settings: Callable[..., DistillSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = distil_here(settings("whole"), Notes())
    with monkeypatch.context() as patch:
        stop_behind(11, patch)
        with pytest.raises(KeyboardInterrupt):
            distil_here(settings("parts"), Notes())
    (work,) = whole.parent.glob(".parts.*")
    assert sorted(path.name for path in (work / "checkpoints").iterdir()) == ["step-000005", "step-000010"]
    (shard,) = (work / "checkpoints" / "step-000010").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    progress = Notes()
    parts = distil_here(settings("parts"), progress)
    assert any("step-000010 is damaged" in note and "using step-000005" in note for note in progress.said)
    assert losses(parts) == losses(whole)


def test_validation_keeps_the_best_student_beside_the_last(settings: Callable[..., DistillSettings]) -> None:
    values = {"val_every": 3, "val_rows": 10, "lr": 0.3, "lr_schedule": "constant"}  # a rate that soon does harm
    last = distil_here(settings("last", **values), Notes())
    lines = read_metrics(last / "metrics.jsonl")
    validated = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert list(validated) == [3, 6, 9, 12]
    best = min(validated, key=validated.__getitem__)
    kept = json.loads((last / "best" / "validation.json").read_text())
    assert (kept["step"], kept["val_loss"]) == (best, pytest.approx(validated[best], rel=1e-5))
    assert (last / "best" / "model.safetensors").is_file()

    first = distil_here(settings("best", export="best", **values), Notes())
    same = load_model(last / "best")[0].state_dict()
    for name, tensor in load_model(first)[0].state_dict().items():
        assert torch.equal(tensor, same[name]), name
    assert (first / "last" / "model.safetensors").is_file()


def test_validation_does_not_disturb_training(settings: Callable[..., DistillSettings], rows: Path) -> None:
    """A run that validates by decoding gives the losses of one that does not, on the same rows."""
    task = {"val_task": "arith", "val_count": 2, "val_rows": 0, "select_by": "accuracy-x-tpf"}
    task["val_decoder_settings"] = {"entropy_threshold": 2.0}
    decoded = distil_here(settings("decoded", val_every=4, val_max_tokens=16, lora_dropout=0.1, **task), Notes())
    plain = distil_here(settings("plain", lora_dropout=0.1), Notes())
    assert losses(decoded) == losses(plain)
    llm = DiffusionLLM.from_pretrained(str(decoded), decoder="d3llm-nocache", entropy_threshold=2.0)
    row = evaluate(llm, load_task("arith"), load_task("arith").problems("validation", 2), 16, progress=Notes())
    line = read_metrics(decoded / "metrics.jsonl")[-1]
    assert line["val_accuracy"] == row.accuracy
    assert line["val_tpf"] == pytest.approx(row.tpf, rel=1e-5) and row.tpf != 1


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_rows(
    settings: Callable[..., DistillSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned = settings("poisoned", checkpoint_every=3)
    original = job.build_student

    def build_student(*arguments: Any) -> Any:
        module, family = original(*arguments)
        forward, calls = module.forward, 0

        def broken(batch: Any) -> Any:
            nonlocal calls
            calls += 1
            loss, figures = forward(batch)
            return (loss * float("nan") if calls == 10 else loss), figures  # the second half of step 5

        module.forward = broken
        return module, family

    with monkeypatch.context() as patch:
        patch.setattr(job, "build_student", build_student)
        with pytest.raises(NotFiniteError, match=r"loss: not finite at step 5, on the rows [0-9a-f, ]+;") as error:
            distil_here(poisoned, Notes())
    assert error.value.args[0].count("0000") >= 8  # the step's eight rows
    (work,) = Path(poisoned.output).parent.glob(".poisoned.*")
    assert [path.name for path in (work / "checkpoints").iterdir()] == ["step-000003"]
    healthy = distil_here(poisoned, Notes())  # the cause is gone: it goes on
    assert losses(healthy) == losses(distil_here(settings("healthy"), Notes()))


def test_score_prefers_small_losses_and_large_products() -> None:
    assert score({"val_loss": 0.1}, "loss") > score({"val_loss": 0.2}, "loss")
    fast, right = {"val_accuracy": 80.0, "val_tpf": 3.0}, {"val_accuracy": 90.0, "val_tpf": 2.0}
    assert score(right, "accuracy") > score(fast, "accuracy")
    assert score(fast, "accuracy-x-tpf") > score(right, "accuracy-x-tpf")


def test_bad_input_is_told_before_any_work(settings: Callable[..., DistillSettings], tmp_path: Path) -> None:
    for values, message in (
        ({"val_every": 3, "val_rows": 4, "val_task": "arit"}, "task: unknown value 'arit'"),
        ({"val_every": 3, "val_rows": 4, "val_task": "arith", "val_decoder": "d3lm"}, "'d3lm'"),
        ({"val_every": 3, "val_rows": 4, "val_task": "arith", "val_decoder_settings": {"size": 1}}, "size"),
        ({"device": "cuda:7"}, "device: got 'cuda:7'; accepted: cpu, or cuda"),
        ({"max_length": 4}, r"at least one row \(keep: all, target: response\)"),
    ):
        with pytest.raises(InputError, match=message):
            distil_here(settings("bad", **values), Notes())
    assert not list(tmp_path.glob(".bad*"))


def test_validation_by_decoding_needs_a_tokenizer(
    settings: Callable[..., DistillSettings], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    mute = tmp_path / "mute"
    mute.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tiny_checkpoint / name, mute / name)
    decoded = {"teacher": str(mute), "val_every": 5, "val_rows": 8, "val_task": "arith"}
    with pytest.raises(InputError, match=r"val_task: got 'arith'; accepted: null, as .*mute' has no tokenizer"):
        distil_here(settings("refused", **decoded), Notes())
    student = distil_here(settings("trained", **{**decoded, "val_task": None}), Notes())
    assert "val_loss" in read_metrics(student / "metrics.jsonl")[-1]
