"""How many replicas a load needs, by hand."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from d3llm_ray.decoding import Request
from d3llm_ray.errors import InputError
from d3llm_ray.serving.autoscaling import CanvasDemand, Load, loads, replicas_needed
from d3llm_ray.serving.service import ChatService

IDLE, HALF, FULL = Load(0, 0, 16), Load(8, 0, 16), Load(16, 0, 16)


@pytest.mark.parametrize(
    ("replicas", "needed"),
    [
        ([], 0),
        ([IDLE], 0),
        ([HALF], 8 / 12),  # 12 of 16 slots are three quarters
        ([FULL], 16 / 12),
        ([Load(12, 0, 16)], 1),
        ([FULL, FULL], 32 / 12),
        ([FULL, IDLE], 16 / 12),
        ([Load(16, 1024, 16)], 16 / 12 + 1),
        ([Load(16, 512, 16)], 16 / 12 + 0.5),
        ([Load(0, 2048, 16)], 2),
        ([Load(3, 0, 4), Load(0, 0, 12)], 3 / 6),  # two kinds during a redeploy: 8 slots on average
    ],
)
def test_replicas_needed(replicas: list[Load], needed: float) -> None:
    assert replicas_needed(replicas, 0.75, 1024) == pytest.approx(needed, abs=1e-6)


def test_the_targets_are_what_the_formula_divides_by() -> None:
    load = [Load(6, 300, 8)]
    assert replicas_needed(load, 0.5, 1e12) == 1.5
    assert replicas_needed(load, 1.0, 100) == 3.75
    assert replicas_needed([Load(0.3, 0, 1)], 0.1, 1) == 3  # not 2.9999999999999996, nor 3.0000000000000004


def test_a_replica_that_has_not_reported_everything_is_left_out() -> None:
    metrics = {"active": {"a": 1.0, "b": 2.0, "c": 3.0}, "queued_tokens": {"a": 4.0, "c": 6.0}, "slots": {"a": 16.0}}
    assert loads(metrics) == [Load(1, 4, 16)]
    assert loads(None) == loads({}) == []
    assert loads({name: {"r": value} for name, value in FULL.figures().items()}) == [FULL]


def context(reported: list[Load], **values: Any) -> Any:
    metrics: dict[str, dict[int, float]] = {}
    for number, load in enumerate(reported):
        for name, value in load.figures().items():
            metrics.setdefault(name, {})[number] = value
    usual = {"current_num_replicas": 1, "target_num_replicas": 1, "total_num_requests": 0.0}
    config = AutoscalingConfig(target_ongoing_requests=4)
    return types.SimpleNamespace(**(usual | values), aggregated_metrics=metrics, config=config)


@pytest.mark.parametrize(
    ("reported", "values", "wanted"),
    [
        ([FULL], {}, 16 / 12),
        ([IDLE], {}, 0),  # to `min_replicas`, which may be none
        ([IDLE], {"total_num_requests": 0.5}, 1),  # tokenised, or read slowly: not without a replica
        ([], {"total_num_requests": 10.0}, 10 / 4),  # nothing told: the target of requests
        ([], {"current_num_replicas": 0, "target_num_replicas": 3}, 3),  # they are on their way
    ],
)
def test_the_policy(reported: list[Load], values: dict[str, Any], wanted: float) -> None:
    assert CanvasDemand()(context(reported, **values)) == (pytest.approx(wanted, abs=1e-6), {})


def test_a_policys_settings() -> None:
    policy = CanvasDemand(active_share=1.0, queued_tokens=10)
    assert policy(context([Load(16, 20, 16)])) == (3, {})
    for values, message in (
        ({"active_share": 0}, "active_share: got 0"),
        ({"active_share": 1.5}, "active_share: got 1.5"),
        ({"queued_tokens": 0}, "queued_tokens: got 0"),
    ):
        with pytest.raises(InputError, match=message):
            CanvasDemand(**values)


def test_a_workers_load_counts_canvases_of_those_that_wait(make_service: Callable[..., ChatService]) -> None:
    """Blocks of 16: 17 tokens have a canvas of 32."""
    worker = make_service(max_batch_size=2).worker
    assert worker.load() == Load(0, 0, 2)
    for max_tokens in (16, 16, 17, 40):
        worker.submit(Request([1], max_tokens=max_tokens))
    assert worker.load() == Load(0, 16 + 16 + 32 + 48, 2)
    worker._take_commands()  # as its thread does, which has not been started
    worker._engine._admit()
    assert worker.load() == Load(2, 32 + 48, 2)
