"""What a step costs: its arithmetic against torch's own counter, and the bare machine."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d3llm_ray.benchmark.shapes import SHAPES
from d3llm_ray.benchmark.step import measure_step
from d3llm_ray.benchmark.step_flops import StepFlops, step_flops
from d3llm_ray.benchmark.step_plan import StepPlan
from d3llm_ray.benchmark.step_rows import COUNTING
from d3llm_ray.distillation.lora import add_lora
from d3llm_ray.distillation.student import recompute_layers
from d3llm_ray.errors import InputError
from d3llm_ray.models import ModelConfig, Ragged, Transformer, Work
from tests.distillation.toys import CONFIGS

CONFIG = ModelConfig(
    vocab_size=11,
    hidden_size=8,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=20,
    max_position_embeddings=64,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    qkv_bias=False,
    tie_word_embeddings=False,
)
RANK, LENGTHS, SCORED = 3, (6, 6, 6), 5
WORK = Work(tokens=18, attended=3 * 36, keys=18, scored=SCORED)
# Adapters: rank times the inputs and outputs of the projections, in which queries have 8 and keys and values 4 outputs.
ADAPTERS = 3 * RANK * ((8 + 8) * 2 + (8 + 4) * 2 + (8 + 20) * 3)


def counted(rank: int, checkpointing: bool) -> int:
    """What torch counts in a forward and backward of the toy shape."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    if checkpointing:
        recompute_layers(model)
    adapted = add_lora(model, rank=rank, alpha=rank, dropout=0.0) if rank else model
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = adapted(torch.zeros(18, dtype=torch.long), Ragged.build(LENGTHS))
        model.logits(hidden[:SCORED]).sum().backward()
    return counter.get_total_flops()


def test_flops_by_hand() -> None:
    # Of each layer: queries and output 8 x 8, keys and values 8 x 4, three matrices 8 x 20.
    matrices = 2 * 18 * 3 * (2 * 64 + 2 * 32 + 3 * 160)
    adapters, head, attention = 2 * 18 * ADAPTERS, 2 * 5 * 88, 4 * 3 * 8 * 108
    forward = matrices + adapters + head + attention
    assert step_flops(CONFIG, WORK, adapters=ADAPTERS, checkpointing=True, recomputed_head=True) == StepFlops(
        forward=forward,
        backward=matrices + 2 * adapters + head + 2 * attention,
        recomputed=forward,
    )
    whole = step_flops(CONFIG, WORK, adapters=0, checkpointing=False, recomputed_head=False)
    assert whole == StepFlops(matrices + head + attention, 2 * (matrices + head + attention), 0)


def test_flops_are_those_that_torch_counts() -> None:
    found = step_flops(CONFIG, WORK, adapters=ADAPTERS, checkpointing=False, recomputed_head=False)
    # Nothing needs the gradient of the first layer's input: 8 x (8 + 4 + 4) weights and three adapters' 3 x 8.
    unneeded = 2 * 18 * (8 * 16 + 3 * RANK * 8)
    assert counted(RANK, checkpointing=False) == found.model - unneeded
    again = step_flops(CONFIG, WORK, adapters=ADAPTERS, checkpointing=True, recomputed_head=False)
    # torch stops before each layer's last product, of the adapter of down_proj.
    assert counted(RANK, checkpointing=True) == again.hardware - unneeded - 3 * 2 * 18 * RANK * 8


def test_flops_of_full_fine_tuning_are_those_that_torch_counts() -> None:
    found = step_flops(CONFIG, WORK, adapters=0, checkpointing=False, recomputed_head=False)
    assert counted(0, checkpointing=False) == found.model


@pytest.fixture
def toy_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(SHAPES, "toy", CONFIGS["llada"])
    return "toy"


def toy_plan(shape: str, **values: Any) -> StepPlan:
    sizes = {"micro_batch_size": 3, "prompt_tokens": 6, "answer_tokens": 16, "window": 8, "lora_rank": 2}
    sheet = {} if values.get("precision") == "float32" else {"machine": "h200"}  # measuring it takes a while
    return StepPlan(shape=shape, warmup_steps=1, steps=3, **{**sizes, **sheet, **values})


@pytest.mark.parametrize(
    "values",
    [
        {"precision": "float32"},
        {"precision": "bfloat16", "accumulation": 2},
        {"precision": "mixed", "complement": False, "activation_checkpointing": False},
        {"precision": "float32", "lora_rank": 0, "head_rows": 7},
    ],
)
def test_a_step_of_a_toy_shape(toy_shape: str, values: dict[str, Any]) -> None:
    plan = toy_plan(toy_shape, **values)
    report = json.loads(str(measure_step(plan)).splitlines()[-1])
    (found,) = report["rows"]
    views = 2 if plan.complement else 1
    assert found["tokens"] == plan.accumulation * 3 * views * 22
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"])
    assert found["samples_per_second"] == pytest.approx(plan.accumulation * 3 / found["seconds"])
    assert found["seconds_low"] <= found["seconds"] <= found["seconds_high"]
    assert set(found["phases_ms"]) == {"forward", "backward", "optimizer"} and min(found["phases_ms"].values()) > 0
    assert len(found["losses"]) == 1 + 3 + 1 and min(found["losses"]) > 0
    # Two layers of hidden size 32 and MLP size 64, every window of 8 once or half of it; vocabulary 5.
    supervised = plan.accumulation * 3 * (8 if plan.complement else 4)
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    adapters = 2 * plan.lora_rank * (4 * 64 + 3 * 96)
    pairs = plan.accumulation * 3 * views * 22**2
    layers = 2 * found["tokens"] * (matrices + adapters) + 4 * 2 * 32 * pairs
    head = 2 * supervised * 5 * 32
    assert found["flops"]["forward"] == layers + head
    recomputed = layers * plan.activation_checkpointing + head * (plan.head_rows == 7)
    assert found["flops"]["recomputed"] == recomputed
    assert found["trained"]["trained"] == (adapters if plan.lora_rank else found["trained"]["parameters"])
    assert found["hfu"] >= found["mfu"] > 0 and report["memory"]["peak"] > report["memory"]["planned"] > 0
    assert report["counting"] == COUNTING and report["plan"]["precision"] == plan.precision


def test_utilisation_by_hand(toy_shape: str) -> None:
    report = measure_step(toy_plan(toy_shape))
    (row,) = report.rows
    row = dataclasses.replace(
        row,
        peak_flops=1e12,
        flops=StepFlops(10**10, 2 * 10**10, 5 * 10**9),
        work=Work(600, 0, 0, 0),
        seconds=(0.4, 0.1, 0.2),
    )
    assert (row.mfu, row.hfu) == pytest.approx((0.15, 0.175))  # 30 and 35 GFLOP in 0.2 s of 1 TFLOP/s
    cells = "| toy | 200.0 (100.0 - 400.0) | 600 | 3000 | 15.00 | 0.035 | 15.0 % | 17.5 % |"
    assert cells in dataclasses.replace(report, rows=(row,)).to_markdown()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size: got 0; accepted: a positive whole number"),
        ({"window": 5}, "window: got 5; accepted: a divisor of answer_tokens"),
        ({"mask_ratio": 0.0}, "mask_ratio: got 0.0"),
        ({"lora_rank": -1}, "lora_rank: got -1"),
        ({"precision": "float16"}, "precision: unknown value 'float16'; accepted: bfloat16, float32, mixed"),
        ({"machine": "h200", "precision": "float32"}, "machine: got 'h200'"),
        ({"device": "tpu"}, "device: got 'tpu'"),
        ({"model": "tiny-llada"}, "shape: got 'toy'; accepted: a model or a shape, not both"),
        ({"shape": "llada-9b"}, "shape: unknown value 'llada-9b'; accepted: dream-7b, llada-8b"),
        ({"shape": "qwen2.5-7b"}, "model: got 'qwen2.5-7b'; accepted: a masked-diffusion model"),
        ({"prompt_tokens": 49}, "prompt_tokens: got 49; accepted: at most 48 before answers of 16"),
    ],
)
def test_a_plan_that_cannot_be_measured(toy_shape: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        measure_step(toy_plan(**{"shape": toy_shape, **values}))
    assert str(caught.value).startswith(message)


BARE = """
import sys
for name in ("pydantic", "pydantic_settings", "ray", "pyarrow", "deepspeed", "matplotlib", "tensorboardX"):
    sys.modules[name] = None  # not installed
import d3llm_ray.distillation.objectives.curriculum, d3llm_ray.distillation.training.loop
from d3llm_ray.benchmark.step import measure_step
from d3llm_ray.benchmark.step_plan import StepPlan
sizes = {"micro_batch_size": 1, "prompt_tokens": 4, "answer_tokens": 8, "window": 4, "lora_rank": 2}
print(measure_step(StepPlan(**sizes, warmup_steps=1, steps=1, machine="h200")))
"""


def test_a_bare_machine_needs_no_edge_packages() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rows"][0]["tokens"] == 2 * 12
