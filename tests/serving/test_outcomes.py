"""How requests end, and what forwards compute for them, as the metrics have it. No Ray."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from ray.util.metrics import Counter as RayCounter
from ray.util.metrics import Metric

from d3llm_ray.serving.schemas import CHAT

MESSAGES = [{"role": "user", "content": "2 + 3 ?"}]
# One token a forward to the end of the canvas.
SLOW = {"entropy_threshold": 0.0, "early_stop": False}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, ...]]:
    """(counter, values of its tags besides the model) to its sum."""
    sums: Counter[tuple[str, ...]] = Counter()

    def record(metric: Metric, value: float, tags: dict[str, str]) -> None:
        if isinstance(metric, RayCounter):
            own = [value for tag, value in tags.items() if tag != "model"]
            sums[(metric.info["name"].removeprefix("d3llm_"), *own)] += int(value)

    monkeypatch.setattr(Metric, "_record", record)
    return sums


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny-random", "messages": MESSAGES, **fields}


def test_requests_that_have_no_answer_are_counted_by_their_reason(
    make_service: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch, counted: Counter[tuple[str, ...]]
) -> None:
    service = make_service()
    with client_of(service) as client:
        assert client.post(CHAT, json=body(max_tokens=8)).status_code == 200
        monkeypatch.setattr(service.llm.engine, "step", lambda: 1 / 0)
        assert client.post(CHAT, json=body(max_tokens=8)).status_code == 500
        deadline = time.monotonic() + 10
        while not counted["finished", "error"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    ended = {key[1]: count for key, count in counted.items() if key[0] == "finished"}
    assert ended.pop("error") == 1 and set(ended) <= {"stop", "length"} and sum(ended.values()) == 1
    assert counted[("requests",)] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_logits_are_not_finite_is_an_error_and_its_neighbour_an_answer(
    make_service: Any, client_of: Any, counted: Counter[tuple[str, ...]], stream: bool
) -> None:
    service = make_service(max_batch_size=2)
    llm = service.llm
    (good,) = llm.generate([MESSAGES], max_tokens=16)
    met = {*good.prompt_ids, *good.response_ids}
    poison = next(token for token in llm.encode("Ann buys 4 pens.") if token not in met)
    with torch.no_grad():
        llm.model.embed_tokens.weight[poison] = torch.nan
    with client_of(service) as client, ThreadPoolExecutor(2) as pool:
        neighbour = pool.submit(client.post, CHAT, json=body(max_tokens=16))
        messages = [{"role": "user", "content": "Ann buys 4 pens."}]
        assert client.post(CHAT, json=body(max_tokens=16, stream=stream, messages=messages)).status_code == 500
        assert neighbour.result(30).json()["choices"][0]["message"]["content"] == good.text
    ended = {key[1]: count for key, count in counted.items() if key[0] == "finished"}
    assert ended == {"error": 1, good.finish_reason: 1}
    assert counted[("requests",)] == 2
    assert counted["tokens", "completion"] == len(good.token_ids)  # the failed one has none


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"decoder": "vanilla"}, {"max_tokens": 48}),
        ({"decoder": "d3llm"}, {"max_tokens": 48, "diffusion": {**SLOW, "refresh_interval": 1}}),
        ({"decoder": "d3llm"}, {"max_tokens": 48, "diffusion": {**SLOW, "refresh_interval": 4}}),
        ({"decoder": "d3llm"}, {"max_tokens": 48, "diffusion": SLOW}),
    ],
    ids=["no cache", "refreshed always", "refreshed often", "refreshed never"],
)
def test_forwards_are_counted_by_what_they_compute(
    make_service: Any, client_of: Any, counted: Counter[tuple[str, ...]], settings: Any, fields: Any, request: Any
) -> None:
    service = make_service(**settings)
    with client_of(service) as client:
        forwards = client.post(CHAT, json=body(**fields)).json()["usage"]["forwards"]
    full, cached = counted["request_forwards", "full"], counted["request_forwards", "cached"]
    assert full + cached == forwards == counted[("forwards",)]
    case = request.node.callspec.id
    if case in ("no cache", "refreshed always"):
        assert cached == 0
    elif case == "refreshed often":
        assert full >= forwards // 4  # every fourth forward, and those that freeze a block
    else:
        assert 0 < full < forwards // 4
