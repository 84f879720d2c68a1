"""`request_timeout_s`: 408 when it passes, in every state of a request, and its work in the engine is cancelled."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from d3llm_ray.serving.schemas import CHAT
from tests.serving.life import count_ends, long_body, slow_down, wait_until


def refusal(limit_s: str) -> dict[str, Any]:
    message = f"the answer was not complete after {limit_s} s"
    return {"error": {"message": message, "type": "timeout_error", "param": None, "code": "request_timeout"}}


def test_an_answer_that_takes_too_long_is_a_408_and_frees_its_slot(
    make_service: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(request_timeout_s=2, max_batch_size=1)
    slow_down(service, monkeypatch, 0.5)
    counted = count_ends(service, monkeypatch)
    with client_of(service) as client:
        began = time.monotonic()
        response = client.post(CHAT, json=long_body(max_tokens=20))
        assert time.monotonic() - began == pytest.approx(2, abs=0.5)
        assert wait_until(lambda: service.llm.engine.active == 0) <= 0.75  # the forward that ran
        assert service.worker.in_flight == 0
    assert (response.status_code, response.json()) == (408, refusal("2"))
    assert counted == {"accepted": 1, "timed_out": 1}


def test_after_the_first_byte_it_is_an_event_and_the_stream_lacks_its_end(
    make_service: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(request_timeout_s=1, max_batch_size=1)
    slow_down(service, monkeypatch, 0.1)
    with client_of(service) as client:
        response = client.post(CHAT, json=long_body(max_tokens=64, stream=True))
        wait_until(lambda: service.llm.engine.active == 0)
    assert response.status_code == 200
    *chunks, last = response.text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: ")) == refusal("1")
    assert len(chunks) > 1 and "[DONE]" not in response.text


def test_waiting_for_a_slot_counts(make_service: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    service = make_service(request_timeout_s=1, max_batch_size=1)
    slow_down(service, monkeypatch, 0.1)
    counted = count_ends(service, monkeypatch)
    with client_of(service) as client, ThreadPoolExecutor(3) as pool:
        began = time.monotonic()
        answers = [pool.submit(client.post, CHAT, json=long_body(max_tokens=64)) for _ in range(3)]
        assert [answer.result(30).status_code for answer in answers] == [408] * 3
        assert time.monotonic() - began == pytest.approx(1, abs=0.5)
        wait_until(lambda: service.llm.engine.active + service.llm.engine.waiting == 0)
    assert counted == {"accepted": 3, "timed_out": 3}


def test_tokenising_counts(make_service: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    service = make_service(request_timeout_s=0.2)
    counted = count_ends(service, monkeypatch)
    monkeypatch.setattr(service.llm, "encode", lambda messages: time.sleep(1))
    with client_of(service) as client:
        began = time.monotonic()
        response = client.post(CHAT, json=long_body())
        assert time.monotonic() - began < 0.7
    assert (response.status_code, response.json()) == (408, refusal("0.2"))
    assert not counted  # it never came to the queue


def test_an_answer_in_time_and_no_limit_are_left_alone(
    make_service: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in (2.0, None):
        service = make_service(request_timeout_s=limit)
        slow_down(service, monkeypatch, 0.02)
        counted = count_ends(service, monkeypatch)
        with client_of(service) as client:
            response = client.post(CHAT, json=long_body(max_tokens=16))
            assert response.json()["usage"]["forwards"] >= 16
            if limit is not None:
                time.sleep(limit)  # the deadline of what has ended means nothing
        assert counted == {"accepted": 1, "finished": 1}
