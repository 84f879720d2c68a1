"""What Prometheus reads of a served model is what its clients count: answers, cancellations, refusals, tokens."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import ray
from ray.util.metrics import Metric

from d3llm_ray.metrics import ServingMetrics
from d3llm_ray.models import load_tokenizer, read_configs
from d3llm_ray.serving.server import APPLICATION, serve_in_background
from d3llm_ray.serving.settings import ServeSettings
from d3llm_ray.tasks import load_task

pytestmark = pytest.mark.slow  # half a minute: Ray exports every ten seconds
MODEL = "counted"  # no other test's
ANSWERED, CANCELLED, BURST = 400, 40, 60
ROOM = 8 + 24
# One token a forward to the end of the canvas: whoever leaves does so long before it.
SLOW: dict[str, Any] = {"diffusion": {"entropy_threshold": 0.0, "early_stop": False, "refresh_interval": 4}}
EXPORTED_WITHIN_S = 60  # Ray's processes report every 10 s


@pytest.fixture(scope="module")
def url(ray_cluster: None) -> Iterator[str]:
    settings = ServeSettings(model="tiny-llada", served_model_name=MODEL, port=0, max_batch_size=8, max_queue=24)
    with serve_in_background(settings) as url:
        yield url


def scraped() -> tuple[Counter[tuple[str, ...]], set[str]]:
    """(series' name and its own tag's value) to its sum over replicas and proxies, and the tags that there are."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(page, timeout=10) as response:
        text = response.read().decode()
    values: Counter[tuple[str, ...]] = Counter()
    seen: set[str] = set()
    for name, labels, value in re.findall(r"^ray_d3llm_(\w+)\{([^}]*)\} (\S+)", text, re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags.get("model") == MODEL and "le" not in tags:
            assert tags["application"] == APPLICATION
            seen |= tags.keys()
            values[name, *(tags[tag] for tag in ("reason", "kind") if tag in tags)] += float(value)
    return values, seen


def client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


async def use(url: str) -> tuple[list[Any], int, int]:
    """500 requests: their answers, and how many were cancelled and refused."""
    problems = load_task("arith").problems("test", 50)
    gate, answers = asyncio.Semaphore(ROOM // 2), list[Any]()
    cancelled = 0

    async with client_of(url) as client:

        async def ask(number: int, **fields: Any) -> Any:
            messages: Any = problems[number % len(problems)].messages
            return await client.chat.completions.create(model=MODEL, messages=messages, **fields)

        async def answer(number: int) -> None:
            answers.append(await ask(number, max_tokens=48))

        async def limited(number: int) -> None:
            async with gate:
                await answer(number)

        async def leave(number: int) -> None:
            nonlocal cancelled
            async with gate:
                stream = await ask(number, max_tokens=200, stream=True, extra_body=SLOW)
                await anext(aiter(stream))
                await stream.close()
                cancelled += 1

        work = [*(leave(number) for number in range(CANCELLED)), *(limited(number) for number in range(ANSWERED))]
        ended = await asyncio.gather(*work, return_exceptions=True)
        ended += await asyncio.gather(*(answer(number) for number in range(BURST)), return_exceptions=True)
    refused = [error for error in ended if error is not None]
    assert all(isinstance(error, openai.RateLimitError) for error in refused), refused[:1]
    return answers, cancelled, len(refused)


def test_counters_are_what_the_clients_counted(url: str) -> None:
    answers, cancelled, refused = asyncio.run(use(url))
    assert len(answers) + cancelled + refused == ANSWERED + CANCELLED + BURST == 500
    assert refused > 0 and cancelled > 0
    tokenizer = load_tokenizer("tiny-llada", read_configs("tiny-llada")[1])
    assert tokenizer is not None
    usages = [answer.usage for answer in answers]
    for answer in answers:  # what the usage says is what the text has
        assert len(tokenizer(answer.choices[0].message.content)["input_ids"]) == answer.usage.completion_tokens
    expected = {
        ("requests_total",): len(answers) + cancelled,
        ("refused_total",): refused,
        ("finished_total", "abort"): cancelled,
        ("tokens_total", "prompt"): sum(usage.prompt_tokens for usage in usages),
        ("tokens_total", "completion"): sum(usage.completion_tokens for usage in usages),
        ("request_seconds_count",): len(answers),
        ("tpf_count",): len(answers),
        ("ttfb_seconds_count",): len(answers) + cancelled,
        ("active",): 0,
        ("queue",): 0,
        ("kv_used",): 0,
    }
    for reason, count in Counter(answer.choices[0].finish_reason for answer in answers).items():
        expected["finished_total", reason] = count
    deadline = time.monotonic() + EXPORTED_WITHIN_S
    while True:
        values, tags = scraped()
        wrong = {key: (values[key], wanted) for key, wanted in expected.items() if values[key] != wanted}
        if not wrong:
            break
        assert time.monotonic() < deadline, f"(exported, counted): {wrong}"
        time.sleep(1)
    assert {key for key in values if key[0] == "finished_total"} <= expected.keys()
    forwards = sum(usage.forwards for usage in usages)
    assert values["request_forwards_total", "full"] + values["request_forwards_total", "cached"] > forwards
    assert values["request_forwards_total", "full"] > len(answers) + cancelled  # the first of each, and refreshes
    assert values[("forwards_total",)] < forwards  # each of many requests
    assert values[("kv_positions",)] > 0
    # Ray exports the sums of histograms as the buckets have them; only their counts are exact.
    tpf = sum(usage.completion_tokens / usage.forwards for usage in usages)
    assert values[("tpf_sum",)] == pytest.approx(tpf, rel=0.2)
    assert {"deployment", "replica", "application", "model"} <= tags
    names = {metric.info["name"] for metric in vars(ServingMetrics(MODEL)).values() if isinstance(metric, Metric)}
    endings = r"_(total|sum|count)$"
    assert {re.sub(endings, "", f"d3llm_{key[0]}") for key in values} >= names
