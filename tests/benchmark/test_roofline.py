"""Roofline figures against values worked out by hand from the shapes' published sizes."""

from __future__ import annotations

import pytest
import torch

from d3llm_ray.benchmark.machine import MACHINES, Machine, find_machine
from d3llm_ray.benchmark.roofline import roofline
from d3llm_ray.benchmark.shapes import SHAPES
from d3llm_ray.models import ModelConfig, Ragged, Work
from d3llm_ray.models.families import read_family

BF16 = torch.bfloat16
KEYS = 400  # 144 prompt tokens and a canvas of 256


def config(shape: str) -> ModelConfig:
    return read_family(SHAPES[shape], {})[0]


def window(batch: int, width: int) -> Work:
    """`batch` requests of KEYS positions that compute `width` each and score what of it is canvas."""
    return Work(batch * width, batch * width * KEYS, batch * KEYS, batch * min(width, 256))


@pytest.mark.parametrize(
    ("shape", "body", "head"),
    [("llada-8b", 6.979e9, 0.518e9), ("dream-7b", 6.525e9, 0.545e9), ("qwen2.5-7b", 6.525e9, 0.545e9)],
)
def test_parameters_of_the_published_shapes(shape: str, body: float, head: float) -> None:
    assert config(shape).body_parameters == pytest.approx(body, abs=0.5e6)
    assert config(shape).head_parameters == pytest.approx(head, abs=0.5e6)


# Batch, window, TFLOP, GB, then milliseconds a forward on H100, H200 and B200; rounded as printed here.
LLADA = [
    (1, 32, 0.49, 15.2, 4.54, 3.17, 1.90),
    (1, 400, 5.93, 15.3, 6.00, 6.00, 2.64),
    (8, 32, 3.89, 16.8, 5.02, 3.93, 2.10),
    (8, 96, 11.68, 17.1, 11.80, 11.80, 5.19),
    (64, 32, 31.14, 29.5, 31.47, 31.47, 13.84),
    (64, 400, 379.68, 36.7, 383.75, 383.75, 168.75),
]
DREAM = [
    (1, 64, 0.92, 14.2, 4.24, 2.96, 1.78),
    (8, 32, 3.66, 14.5, 4.32, 3.70, 1.81),
    (32, 96, 43.93, 16.7, 44.40, 44.40, 19.53),
    (64, 400, 356.06, 25.6, 359.88, 359.88, 158.25),
]


@pytest.mark.parametrize(
    ("shape", "row"), [*(("llada-8b", row) for row in LLADA), *(("dream-7b", row) for row in DREAM)]
)
def test_one_forward_of_a_batch(shape: str, row: tuple[float, ...]) -> None:
    batch, width, tera_flops, gigabytes, *milliseconds = row
    work = window(int(batch), int(width))
    assert config(shape).flops(work) / 1e12 == pytest.approx(tera_flops, abs=0.0051)
    assert config(shape).traffic(work, BF16.itemsize) / 1e9 == pytest.approx(gigabytes, abs=0.051)
    for name, expected in zip(("h100", "h200", "b200"), milliseconds, strict=True):
        limit = roofline(config(shape), BF16, [work], MACHINES[name])
        assert 1e3 * limit.seconds == pytest.approx(expected, abs=0.0051)


def test_forwards_are_added_up_each_with_its_own_ceiling() -> None:
    # A request of 28 forwards at 9.11 tokens each: one full one, limited by arithmetic, and 27 by memory.
    forwards = [window(1, 400), *[window(1, 64)] * 27]
    limit = roofline(config("llada-8b"), BF16, forwards, MACHINES["h200"])
    assert limit.compute_bound == 1
    assert 1e3 * limit.seconds == pytest.approx(6.00 + 27 * 3.174, abs=0.02)
    assert 28 * 9.11 / limit.seconds == pytest.approx(2780, rel=0.005)


def test_every_term_by_hand() -> None:
    shape = ModelConfig(
        vocab_size=10,
        hidden_size=4,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=8,
        max_position_embeddings=16,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        qkv_bias=False,
        tie_word_embeddings=False,
    )
    # A layer: q and o 4 x 4, k and v 4 x 2, three matrices 4 x 8; the head is 4 x 10.
    assert shape.body_parameters == 2 * (32 + 16 + 96) == 288
    assert shape.head_parameters == 40
    work = Ragged.build([3, 2], [2, 0], [5, 7]).work(scored=4)
    assert work == Work(tokens=5, attended=3 * 5 + 2 * 7, keys=12, scored=4)
    assert shape.flops(work) == 2 * 288 * 5 + 2 * 40 * 4 + 4 * 2 * 4 * 29
    # Keys and values: 2 layers x 2 x 1 head x 2 features; logits 4 x 10, written and read.
    assert shape.traffic(work, torch.float32.itemsize) == 4 * ((288 + 40) + 12 * 8 + 2 * 40)
    limit = roofline(shape, torch.float32, [work, work], Machine("m", flops=1e3, bandwidth=1e6))
    assert limit.seconds == pytest.approx(2 * 4128 / 1e3) and limit.compute_bound == 2


def test_a_measured_machine_has_plausible_figures() -> None:
    machine = find_machine("measured", torch.device("cpu"), torch.float32)
    assert machine.name == "measured"
    assert 1e9 < machine.flops < 1e15 and 1e8 < machine.bandwidth < 1e13
