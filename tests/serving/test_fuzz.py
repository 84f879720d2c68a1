"""Requests that nobody would write by hand, to every route of the OpenAPI document: no answer of 500 or above.

schemathesis makes them from the document, half of them within it and half beside it, and headers and queries of any
kind come on top. `make fuzz` sends 2,000 and more to each route, the ordinary suite a few.
"""

from __future__ import annotations

import os
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
from tests.test_compatibility import routes

FEW, MANY = 20, int(os.environ.get("FUZZ_CASES", "100"))  # at least, of each of the two modes; make fuzz: 1,000
SPARE = 1.2  # some cases no client can spell
WITHIN_S = 10.0
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


@pytest.fixture(scope="module")
def operations(url: str) -> dict[str, Any]:
    """What the OpenAPI document lists, by `METHOD /path`."""
    schema = schemathesis.openapi.from_dict(requests.get(f"{url}/openapi.json", timeout=WITHIN_S).json())
    return {operation.label: operation for operation in (found.ok() for found in schema.get_all_operations())}


class Tally:
    """What was sent and answered."""

    def __init__(self) -> None:
        self.sent, self.slowest = 0, 0.0
        self.answers: Counter[int] = Counter()

    def send(self, **request: Any) -> requests.Response | None:
        """The answer to a case; None for one that no client can spell."""
        began = time.monotonic()
        try:
            answer: requests.Response = request.pop("case").call(timeout=WITHIN_S, **request)
        except UnicodeError:
            return None
        self.sent += 1
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.answers[answer.status_code] += 1
        return answer


def fuzz(operation: Any, mode: GenerationMode, url: str, count: int, tally: Tally) -> None:
    session = requests.Session()

    @settings(
        max_examples=int(SPARE * count),
        deadline=None,
        database=None,
        derandomize=count == FEW,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), served=st.booleans(), query=QUERY, headers=HEADERS)
    def send(case: Any, served: bool, query: dict[str, str], headers: dict[str, bytes]) -> None:
        if served and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "tiny-random"  # which would hardly be guessed
        answer = tally.send(case=case, base_url=url, session=session, params=query, headers=headers)
        if answer is not None:
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    send()


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("route", routes())
def test_no_request_makes_the_server_fail(url: str, operations: dict[str, Any], route: str, count: int) -> None:
    assert set(operations) == set(routes())
    tally, process = Tally(), psutil.Process()
    before = process.memory_info().rss
    fuzz(operations[route], GenerationMode.POSITIVE, url, count, tally)
    try:
        fuzz(operations[route], GenerationMode.NEGATIVE, url, count, tally)
    except Unsatisfiable:  # no input, or one that takes any text: there is nothing beside the document
        fuzz(operations[route], GenerationMode.POSITIVE, url, count, tally)
    grown = process.memory_info().rss - before
    answers = dict(sorted(tally.answers.items()))
    print(f"{route}: {tally.sent} cases, answers {answers}, slowest {tally.slowest:.2f} s, {grown / 1e6:.0f} MB more")
    assert tally.slowest < WITHIN_S
    assert requests.get(f"{url}/health", timeout=WITHIN_S).status_code == 200
    assert tally.sent >= 2 * count
