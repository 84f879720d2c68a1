"""What a run owes to its rows: their order, their noise, the weight of each; and figures that others compute too."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy, log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from d3llm_ray.config import build
from d3llm_ray.distillation import preparation
from d3llm_ray.distillation.data import TrajectorySet, read_rows
from d3llm_ray.distillation.local import distil_here
from d3llm_ray.distillation.lora import add_lora
from d3llm_ray.distillation.objectives import PseudoTrajectory
from d3llm_ray.distillation.objectives.batches import MicroBatch, epoch_order
from d3llm_ray.distillation.plan import TrainingPlan
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.distillation.student import build_student, merged, write_student
from d3llm_ray.distillation.training import loop
from d3llm_ray.distillation.training.loop import Hooks, train
from d3llm_ray.distillation.training.metrics_file import read_metrics
from d3llm_ray.distillation.training.validation import Validator
from d3llm_ray.models import ModelConfig, Transformer, load_model, read_configs, save_model
from d3llm_ray.models.families import read_family
from d3llm_ray.models.ragged import Ragged
from d3llm_ray.progress import Progress
from d3llm_ray.trajectories.schema import read_trajectories
from tests.distillation.toys import CONFIGS, family_of

CPU = torch.device("cpu")
CANVAS, EPOCHS = 32, 2


@pytest.fixture(scope="module")
def rows(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, write_trajectories: Callable[..., Path]
) -> Path:
    _, family = read_configs(tiny_checkpoint)
    folder = tmp_path_factory.mktemp("laws")
    return write_trajectories(folder, rows=24, canvas=CANVAS, vocab_size=4, mask_token_id=family.mask_token_id)


@pytest.fixture(scope="module")
def samples(rows: Path) -> TrajectorySet:
    return TrajectorySet(read_trajectories(rows))


def plan_of(samples: TrajectorySet, **values: Any) -> TrainingPlan:
    given = {"trajectories": "r", "output": "o", "workers": 1, "batch_size": 8, "micro_batch_size": 4, "epochs": EPOCHS}
    return TrainingPlan(build(DistillSettings, {**given, **values}), samples, family_of("llada")[1])


def numbers(plan: TrainingPlan) -> range:
    return range(plan.max_steps * plan.micro_batches_per_step)


def masks(plan: TrainingPlan) -> dict[str, list[tuple[int, ...]]]:
    """By row: the positions of the answer that its first view hides in each epoch."""
    hidden: dict[str, list[tuple[int, ...]]] = {}
    for number in numbers(plan):
        micro = plan.micro_batch(number)
        views = np.split(micro.token_ids, np.cumsum(micro.lengths)[:-1])
        for row, view, prompt in zip(micro.prompt_ids, views, micro.prompt_lengths, strict=False):
            hidden.setdefault(row, []).append(tuple(np.flatnonzero(view[prompt:] == 4)))
    return hidden


def test_rows_of_like_length_meet_in_micro_batches_that_come_in_any_order() -> None:
    """400 rows of 400 lengths in fours: neighbours by length, which neither grow nor shrink from batch to batch."""
    lengths = np.arange(400)
    order = epoch_order(lengths, seed=0, epoch=0, batch_size=8, micro_batch_size=4)
    assert order.shape == (50, 2, 4)
    found = order.reshape(-1, 4)
    assert sorted(map(tuple, found)) == [tuple(range(first, first + 4)) for first in range(0, 400, 4)]
    assert 30 < int((np.diff(found[:, 0]) < 0).sum()) < 70  # 49.5 of 99 are expected


def test_the_order_of_rows_follows_seed_and_epoch(samples: TrajectorySet) -> None:
    def order(seed: int) -> list[tuple[str, ...]]:
        plan = plan_of(samples, seed=seed)
        return [plan.micro_batch(number).prompt_ids for number in numbers(plan)]

    first, again, other = order(0), order(0), order(1)
    epoch = len(first) // EPOCHS
    assert first == again
    assert first[:epoch] != other[:epoch] and first[:epoch] != first[epoch : 2 * epoch]
    assert sorted(sum(first[:epoch], ())) == sorted(samples.prompt_ids.tolist())


# A quarter of one window, the whole answer: what is hidden depends on the order alone.
QUARTER = {"window_sizes": [CANVAS], "noise_start": 0.25, "noise_end": 0.25, "noise_max": 0.25}


@pytest.mark.parametrize("order", ["trajectory", "reversed", "shuffled", "inverted"])
def test_a_row_keeps_its_order_in_every_epoch(samples: TrajectorySet, order: str) -> None:
    hidden = masks(plan_of(samples, objective={**QUARTER, "order": order}))
    assert len(hidden) == 24 and all(len(epochs) == EPOCHS and len(set(epochs)) == 1 for epochs in hidden.values())
    assert len({epochs[0] for epochs in hidden.values()}) > 20  # and each row its own
    by_hand, places = {}, set()
    for n in range(24):
        revealed = np.argsort(samples[n].reveal_step, kind="stable")
        places.add(tuple(np.flatnonzero(np.isin(revealed, hidden[samples[n].prompt_id][0]))))
        last = revealed[24:] if order == "trajectory" else revealed[:8]
        by_hand[samples[n].prompt_id] = tuple(sorted(last.tolist()))
    same = sum(hidden[row][0] == by_hand[row] for row in hidden)
    assert same == (24 if order in ("trajectory", "reversed") else 0)
    if order in ("shuffled", "inverted"):
        assert len(places) > 12  # a row's own disorder
        assert hidden != masks(plan_of(samples, seed=1, objective={**QUARTER, "order": order}))


def test_random_masks_and_windows_are_drawn_anew_in_every_epoch(samples: TrajectorySet) -> None:
    for objective in ({**QUARTER, "order": "random"}, {**QUARTER, "window_sizes": [8]}, {**QUARTER, "noise_max": 0.9}):
        hidden = masks(plan_of(samples, objective=objective))
        assert sum(len(set(epochs)) > 1 for epochs in hidden.values()) > 12
        assert hidden != masks(plan_of(samples, objective=objective, seed=1))


class Counted:
    """An engine of one of two workers, which notes the seed of the noise of every forward."""

    world_size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.seeds: list[int] = []

    def forward(self, _batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.seeds.append(torch.initial_seed())
        return torch.tensor(1.0), torch.zeros(4)

    def backward(self, _loss: torch.Tensor) -> None: ...

    def step(self, _lr: float) -> float:
        return 1.0


def test_dropout_draws_anew_in_every_step_and_on_every_worker(
    samples: TrajectorySet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "dist", SimpleNamespace(all_reduce=lambda _tensor: None))
    hooks = Hooks(log=lambda _line: None, save=lambda _step: None, validate=lambda _step: {})
    module: Any = SimpleNamespace(batch=lambda micro, _device: micro)

    def seeds(seed: int, rank: int, done: int) -> list[int]:
        plan = plan_of(samples, workers=2, seed=seed)
        engine = Counted(rank)
        batches = (plan.micro_batch(number) for number in plan.numbers(done, rank, 2))
        train(engine, module, plan, batches, done, hooks, CPU)  # type: ignore[arg-type]
        return engine.seeds

    first, second = seeds(0, 0, 0), seeds(0, 1, 0)
    assert len(set(first + second)) == 2 * 6
    assert seeds(0, 0, 4) == first[4:]  # a resumed run repeats them
    assert first != seeds(100, 0, 0)


def test_validation_averages_rows_however_they_are_batched(rows: Path, samples: TrajectorySet, tmp_path: Path) -> None:
    """Three micro-batches of 4, 4 and 1 rows: the last row is one of nine, not one of three."""
    plan = plan_of(samples, val_every=1, val_rows=9)
    held_out = plan.validation(TrajectorySet(read_trajectories(rows).slice(0, 9)), 0, 1)
    assert [len(micro.prompt_ids) for micro in held_out] == [4, 4, 1]
    losses = iter([1.0, 2.0, 10.0])

    class Module:
        def __call__(self, micro: MicroBatch) -> tuple[torch.Tensor, None]:
            return torch.tensor(next(losses)), None

        def batch(self, micro: MicroBatch, _device: torch.device) -> MicroBatch:
            return micro

        def eval(self) -> None: ...

        def train(self) -> None: ...

    engine: Any = SimpleNamespace(rank=0, world_size=1, whole=contextlib.nullcontext)
    module: Any = Module()
    validator = Validator(plan.settings, module, plan.family, engine, held_out, Path.mkdir, tmp_path, CPU)
    assert validator(1)["val_loss"] == pytest.approx((4 * 1 + 4 * 2 + 10) / 9)


@pytest.mark.parametrize("adapted", [True, False])
def test_a_student_with_a_tied_head_is_whole(adapted: bool, tmp_path: Path) -> None:
    shape, family = read_family({**CONFIGS["dream"], "tie_word_embeddings": True}, {})
    torch.manual_seed(0)
    model: Any = Transformer(shape).eval()
    if adapted:
        model = add_lora(model, rank=2, alpha=2, dropout=0.0)
    ids, whole = torch.arange(4), Ragged.build([4])
    with torch.no_grad():
        expected = model.logits(model(ids, whole))
    student = merged(model)
    assert [name for name, tensor in student.state_dict(keep_vars=True).items() if tensor.is_meta] == []
    assert student.lm_head.weight is student.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(student.logits(student(ids, whole)), expected)
    teacher = save_model(Transformer(shape), family, tmp_path / "teacher")
    settings = build(DistillSettings, {"trajectories": "r", "output": "o", "teacher": str(teacher)})
    write_student(model, family, settings, tmp_path / "student")
    with torch.no_grad():
        written = load_model(tmp_path / "student")[0]
        torch.testing.assert_close(written.logits(written(ids, whole)), expected)


# Every term weighs something else, and the norm of the gradients is clipped.
OBJECTIVE = {"window_sizes": [16], "noise_start": 0.5, "noise_end": 0.5, "noise_max": 0.5}
OBJECTIVE |= {"ce_weight": 0.5, "complement_weight": 0.2, "certainty_weight": 0.3, "certainty_views": "a"}
OUTSIDE = {"objective": OBJECTIVE, "workers": 1, "batch_size": 4, "micro_batch_size": 2, "max_steps": 3}
OUTSIDE |= {"lr": 0.01, "lr_schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.1, "betas": [0.8, 0.95]}
OUTSIDE |= {"clip": 0.5, "lora_rank": 4, "lora_alpha": 8, "precision": "float32"}


def llama(shape: ModelConfig, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """The same network as transformers has it; LLaDA's is Llama's without the causal mask."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        rms_norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        max_position_embeddings=shape.max_position_embeddings,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    named = {name if name.startswith("lm_head") else f"model.{name}": weight for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(named, strict=False)
    assert not missing and not unexpected
    return model


def published_loss(model: Any, micro: MicroBatch) -> torch.Tensor:
    """arXiv:2601.07568, section 3, from one forward a row: both cross-entropies, and view A's entropy where right."""
    logits = []
    for row in np.split(micro.token_ids, np.cumsum(micro.lengths)[:-1]):
        seen = torch.zeros(1, 1, len(row), len(row))
        logits.append(model(input_ids=torch.from_numpy(row).long()[None], attention_mask=seen).logits[0])
    predicted = torch.cat(logits)[torch.from_numpy(micro.rows)]
    labels = torch.from_numpy(micro.labels).long()
    first_views = micro.lengths[: len(micro.prompt_ids)].sum()
    view_b = torch.from_numpy(micro.rows >= first_views)
    ce = cross_entropy(predicted, labels, reduction="none")
    right = (predicted.argmax(-1) == labels) & ~view_b
    cold = log_softmax(predicted / 0.5, -1)[right]
    entropy = -(cold.exp() * cold).sum(-1)
    certainty = entropy.mean() if right.any() else 0.0
    return 0.5 * ce[~view_b].mean() + 0.2 * ce[view_b].mean() + 0.3 * certainty


def test_three_steps_are_those_of_transformers_peft_and_torch(
    rows: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figure from outside for all tests that compare one run of ours with another."""
    monkeypatch.setattr(preparation, "can_plot", lambda *_: False)
    paths = {"teacher": str(tiny_checkpoint), "trajectories": str(rows), "output": str(tmp_path / "student")}
    settings = build(DistillSettings, OUTSIDE | paths)
    student = distil_here(settings, Progress(quiet=True))

    teacher, family = load_model(tiny_checkpoint)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        llama(teacher.config, teacher.state_dict()), LoraConfig(r=4, lora_alpha=8, target_modules=names)
    )
    torch.manual_seed(0)
    begun = build_student(settings, CPU)[0].model  # where its adapters begin
    assert isinstance(begun, PeftModel)
    trained = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    for name, weight in begun.named_parameters():
        if "lora_" in name:
            trained[name.replace("base_model.model.", "base_model.model.model.")].data.copy_(weight)
    plan = TrainingPlan(settings, TrajectorySet(read_rows(str(rows))[0]), family)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    losses, norms = [], []
    for step in range(3):
        optimizer.zero_grad()
        both = [published_loss(model, plan.micro_batch(2 * step + n)) for n in (0, 1)]
        loss = torch.stack(both).mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)))
        optimizer.step()
        losses.append(loss.item())
    lines = read_metrics(student / "metrics.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-4)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-3) and min(norms) > 0.5
    whole = model.merge_and_unload().state_dict()
    moved = 0.0
    for name, tensor in load_model(student)[0].state_dict().items():
        expected = whole[name if name.startswith("lm_head") else f"model.{name}"]
        torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=2e-4)
        moved = max(moved, float((tensor - teacher.state_dict()[name]).abs().max()))
    assert moved > 0.01


def test_the_objective_of_that_figure_is_not_the_default() -> None:
    values = dataclasses.asdict(PseudoTrajectory())
    assert all(values[name] != value for name, value in OBJECTIVE.items() if name != "certainty_views")
