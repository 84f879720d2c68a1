"""The memory plan against figures worked by hand, torch's own counts and what autograd really keeps."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from d3llm_ray.benchmark.shapes import SHAPES
from d3llm_ray.device import peak_memory
from d3llm_ray.distillation.lora import add_lora
from d3llm_ray.distillation.memory import TrainingMemoryPlan, plan_memory, plan_of
from d3llm_ray.distillation.objectives import LossModule, PseudoTrajectory
from d3llm_ray.distillation.objectives.batches import MicroBatch
from d3llm_ray.distillation.settings import DistillSettings
from d3llm_ray.models import ModelConfig, Ragged, Transformer, read_configs
from d3llm_ray.models.families import read_family

LLADA_8B, _ = read_family(SHAPES["llada-8b"], {"block_size": 32})
ADAPTERS_8B = 671_088_640  # 32 layers x 256 x (4 x (4096 + 4096) + 3 x (4096 + 12288))
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PUBLISHED_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj")


def plan(config: ModelConfig = LLADA_8B, **changed: Any) -> TrainingMemoryPlan:
    """LLaDA's recipe on four workers, with changes."""
    chosen: dict[str, Any] = {
        "rank": 256,
        "targets": None,
        "precision": "bfloat16",
        "zero_stage": 2,
        "workers": 4,
        "offload": "none",
        "micro_batch_size": 4,
        "longest_row": 384,
        "rows_per_sample": 2,
        "supervised_rows": 128,
        "head_rows": 1024,
        "activation_checkpointing": True,
    }
    return plan_memory(config, **{**chosen, **changed})


def test_llada_8b_by_hand() -> None:
    planned_memory = plan()
    assert planned_memory.parameters == 8_015_581_184  # 16.0 GB in bfloat16
    assert planned_memory.trained == ADAPTERS_8B
    assert (planned_memory.weights, planned_memory.copies) == (2 * 8_015_581_184, 0)
    assert planned_memory.adapters == 2 * ADAPTERS_8B
    assert planned_memory.gradients == 2 * ADAPTERS_8B // 4
    assert planned_memory.optimizer == 12 * ADAPTERS_8B // 4
    # bytes a token and layer: norms' inputs; q, k, v, mixed; four products of the MLP; two inputs; seven adapters
    by_layer = 2 * 4 * 4096 + 2 * (4 * 4096 + 4 * 12288 + 2 * 4096 + 7 * 256)
    assert planned_memory.tokens == 3072
    assert planned_memory.activations == 3072 * (32 * 2 * 4096 + 2 * by_layer)
    assert planned_memory.activations_otherwise == 3072 * 33 * by_layer
    assert planned_memory.logits == 6 * 4 * 128 * 126_464
    assert (
        planned_memory.total
        == planned_memory.weights
        + 2 * ADAPTERS_8B
        + 14 * ADAPTERS_8B // 4
        + planned_memory.activations
        + planned_memory.logits
    )
    assert planned_memory.on_host == 0


def test_the_published_targets_train_a_third_as_many() -> None:
    assert plan(targets=PUBLISHED_TARGETS).trained == 32 * 256 * (3 * 8192 + 16384)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"), [(0, 1, 1, 1), (1, 1, 1, 4), (2, 1, 4, 4), (3, 4, 4, 4)]
)
def test_zero_splits_what_its_stage_says(stage: int, weights: int, gradients: int, optimizer: int) -> None:
    planned_memory = plan(rank=0, zero_stage=stage)
    assert planned_memory.trained == planned_memory.parameters and planned_memory.adapters == 0
    assert planned_memory.weights == 2 * 8_015_581_184 // weights
    assert planned_memory.gradients == 2 * 8_015_581_184 // gradients
    assert planned_memory.optimizer == 12 * 8_015_581_184 // optimizer


def test_offloading_moves_to_the_host() -> None:
    optimizer, everything = plan(offload="optimizer"), plan(offload="all", zero_stage=3)
    assert (optimizer.optimizer, optimizer.gradients) == (0, 0)
    assert optimizer.on_host == 16 * ADAPTERS_8B // 4  # masters, two moments, gradients
    assert optimizer.weights == plan().weights
    assert (everything.weights, everything.adapters) == (0, 0)
    assert everything.on_host == (16 * ADAPTERS_8B + 2 * 8_015_581_184 + 2 * ADAPTERS_8B) // 4


@pytest.mark.parametrize(
    ("precision", "stage", "weight", "adam", "copy"),
    [("float32", 0, 4, 8, 0), ("float32", 2, 4, 12, 0), ("mixed", 2, 4, 12, 2), ("bfloat16", 0, 2, 12, 0)],
)
def test_bytes_by_precision(precision: str, stage: int, weight: int, adam: int, copy: int) -> None:
    planned_memory = plan(precision=precision, zero_stage=stage, workers=1, rank=0)
    cast = 8_015_581_184 - 65 * 4096 - 126_464 * 4096  # all but the norms and the embeddings
    assert (planned_memory.weights, planned_memory.gradients) == (weight * 8_015_581_184, weight * 8_015_581_184)
    assert (planned_memory.optimizer, planned_memory.copies) == (adam * 8_015_581_184, copy * cast)


@pytest.mark.parametrize("teacher", ["tiny-llada", "tiny-ar", "dream-7b-like"])
@pytest.mark.parametrize("rank", [0, 3])
def test_counts_are_torchs(teacher: str, rank: int) -> None:
    if teacher == "dream-7b-like":  # grouped queries, biases; tied, as its small relatives are
        config = ModelConfig(64, 32, 2, 4, 2, 48, 64, 1e4, 1e-6, qkv_bias=True, tie_word_embeddings=True)
    else:
        config, _ = read_configs(teacher)
    model = Transformer(config)
    planned_memory = plan(config, rank=rank, targets=PUBLISHED_TARGETS)
    assert planned_memory.parameters == sum(weight.numel() for weight in model.parameters())
    if rank:
        adapted = add_lora(model, rank=rank, alpha=1, dropout=0.0, targets=PUBLISHED_TARGETS)
        assert planned_memory.trained == sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


@pytest.mark.parametrize("precision", ["float32", "mixed", "bfloat16"])
@pytest.mark.parametrize(
    ("rank", "targets"),
    [(0, PROJECTIONS), (4, PROJECTIONS), (4, PUBLISHED_TARGETS), (4, ("q_proj", "o_proj")), (4, ("down_proj",))],
)
def test_activations_are_what_autograd_keeps(precision: str, rank: int, targets: tuple[str, ...]) -> None:
    tokens = 257  # a prime: what is not a multiple of it is no activation
    shape = ModelConfig(40, 64, 2, 4, 2, 192, 512, 1e4, 1e-5, qkv_bias=False, tie_word_embeddings=False)
    deeper = dataclasses.replace(shape, num_layers=3)
    kept, planned = [], []
    for config in (shape, deeper):
        model = Transformer(config).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
        trained = add_lora(model, rank=rank, alpha=4, dropout=0.0, targets=targets) if rank else model
        if precision == "bfloat16":
            trained = trained.to(torch.bfloat16)  # as the engines do with adapters
        kept.append(bytes_kept(trained, tokens, mixed=precision == "mixed"))
        changed: dict[str, Any] = {"micro_batch_size": 1, "rows_per_sample": 1, "longest_row": tokens}
        changed |= {"rank": rank, "targets": targets, "precision": precision, "activation_checkpointing": False}
        planned.append(plan(config, **changed).activations)
    assert kept[1] - kept[0] == pytest.approx(planned[1] - planned[0], rel=0.02)  # norms' and softmax's statistics


def bytes_kept(model: Any, tokens: int, *, mixed: bool) -> int:
    """Bytes of the distinct activations that a backward pass would read."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.nbytes() % tokens == 0:
            kept[storage.data_ptr()] = tensor
        return tensor

    fused = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    with saved_tensors_hooks(keep, lambda tensor: tensor), fused, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = model(torch.zeros(tokens, dtype=torch.int64), Ragged.build([tokens]))
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("supervised", [40, 100])
def test_no_more_logits_exist_than_head_rows(supervised: int) -> None:
    """Neither the supervised rows nor the tokens of a batch make the logits larger."""
    vocabulary, head_rows, tokens = 5000, 16, 200
    config = ModelConfig(vocabulary, 8, 1, 1, 1, 8, 512, 1e4, 1e-5, qkv_bias=False, tie_word_embeddings=False)
    model = Transformer(config)
    model.lm_head.requires_grad_(False)
    objective = PseudoTrajectory(certainty_views="both")
    micro = MicroBatch(
        prompt_ids=("a",),
        token_ids=np.arange(tokens, dtype=np.int32),
        lengths=np.array([tokens // 2] * 2),
        prompt_lengths=np.array([4, 4]),
        rows=np.arange(supervised),
        labels=np.arange(supervised, dtype=np.int32),
        weights=np.ones(supervised, dtype=np.float32),
        second=np.arange(supervised) >= supervised // 2,
        mask_ratio=0.5,
    )
    largest = {}
    for rows_at_a_time in (head_rows, supervised):
        module = LossModule(model, objective, head_rows=rows_at_a_time, autocast=False)
        batch = module.batch(micro, torch.device("cpu"))
        with Largest() as seen:
            loss, _ = module(batch)
            loss.backward()
        largest[rows_at_a_time] = seen.elements
    assert largest == {head_rows: head_rows * vocabulary, supervised: supervised * vocabulary}


def test_views_and_rows_by_objective() -> None:
    config, _ = read_configs("tiny-llada")

    def of(*, head_rows: int = 1024, **objective: Any) -> tuple[int, int]:
        given: dict[str, Any] = {"trajectories": "rows", "output": "out", "micro_batch_size": 4, "batch_size": 8}
        settings = DistillSettings(**given, head_rows=head_rows, objective=objective)
        planned_memory = plan_of(settings, config, 100)
        return planned_memory.tokens, planned_memory.logit_rows

    canvas = {"window_sizes": (16, 32), "window_domain": "canvas"}
    assert of(**canvas) == (2 * 4 * 100, 4 * 32)
    assert of(**canvas, complement_weight=0) == (4 * 100, 4 * 32)
    assert of(window_sizes=(16, 32)) == (2 * 4 * 100, 4 * 100)  # the last window may be all of the canvas
    assert of(name="d2f", head_rows=64) == (4 * 100, 64)
    assert of(name="block-diffusion") == (3 * 4 * 100, 4 * 100)


def test_in_words() -> None:
    text = str(plan())
    assert text.startswith("memory plan of each of 4 workers (ZeRO 2, bfloat16):\n")
    figures = dict(re.findall(r"^  (\S.*?)  +([\d.]+) GiB", text, re.MULTILINE))
    assert figures == {
        "weights": "14.930",
        "adapters": "1.250",
        "gradients": "0.312",
        "optimizer": "1.875",
        "activations": "1.802",
        "LM head": "0.362",
        "total": "20.531",
    }
    assert "17.354 GiB without activation checkpointing" in text
    assert "in CPU memory" in str(plan(offload="optimizer"))


@pytest.mark.skipif(sys.platform != "linux", reason="the oracle is /proc")
def test_memory_of_a_cpu_is_the_process_s_peak() -> None:
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_memory(torch.device("cpu")) == pytest.approx(int(peak.split()[1]) * 1024, rel=0.02)
