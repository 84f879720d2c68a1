"""Requests that nobody would write by hand, to every route of the OpenAPI document: no answer of 500 or above.

schemathesis makes them from the document, half of them within it and half beside it, and headers and queries of any
kind come on top. `make fuzz` sends 2,000 to each route, the ordinary suite a few.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

from d3llm_ray.serving.local import serve_locally
from d3llm_ray.serving.settings import ReplicaSettings

FEW, MANY = 20, 1000  # of each of the two modes
WITHIN_S = 10.0
GROWTH_BYTES = 50_000_000
QUERY = st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3)
HEADER_VALUE = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=20).map(str.strip)
HEADERS = st.dictionaries(
    st.sampled_from(["X-Request-Id", "Authorization", "Origin", "Accept", "Cookie", "X-Other", "Accept-Language"]),
    HEADER_VALUE.map(lambda text: text.encode("latin-1")),
    max_size=3,
)


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path) -> Iterator[str]:
    with serve_locally(ReplicaSettings(model=str(tiny_checkpoint), max_tokens=8, max_tokens_limit=32)) as url:
        yield url


def operations(url: str) -> dict[str, Any]:
    """What the OpenAPI document lists, by `METHOD /path`."""
    document = requests.get(f"{url}/openapi.json", timeout=WITHIN_S).json()
    schema = schemathesis.openapi.from_dict(document)
    return {operation.label: operation for operation in (found.ok() for found in schema.get_all_operations())}


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_no_request_makes_the_server_fail(url: str, count: int) -> None:
    sent: Counter[str] = Counter()
    answered: Counter[int] = Counter()
    process, session = psutil.Process(), requests.Session()
    slowest, grown = 0.0, 0

    def fuzz(label: str, operation: Any, mode: GenerationMode) -> None:
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=count == FEW,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode), query=QUERY, headers=HEADERS)
        def send(case: Any, query: dict[str, str], headers: dict[str, bytes]) -> None:
            nonlocal slowest
            began = time.monotonic()
            try:
                answer = case.call(base_url=url, session=session, params=query, headers=headers, timeout=WITHIN_S)
            except UnicodeError:
                return  # a client that cannot spell it
            slowest = max(slowest, time.monotonic() - began)
            sent[label] += 1
            answered[answer.status_code] += 1
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        send()

    found = operations(url)
    assert len(found) >= 4
    before = process.memory_info().rss
    for label, operation in found.items():
        fuzz(label, operation, GenerationMode.POSITIVE)
        try:
            fuzz(label, operation, GenerationMode.NEGATIVE)
        except Unsatisfiable:  # no input, or one that takes any text: there is nothing beside the document
            fuzz(label, operation, GenerationMode.POSITIVE)
    grown = process.memory_info().rss - before
    print(f"{dict(sent)}; answers {dict(sorted(answered.items()))}; slowest {slowest:.2f} s; {grown / 1e6:.0f} MB more")
    assert slowest < WITHIN_S
    assert requests.get(f"{url}/health", timeout=WITHIN_S).status_code == 200
    if count == MANY:
        assert min(sent.values()) >= 2 * MANY and set(sent) == set(found)
