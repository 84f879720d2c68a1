"""What clients and Serve hear when the engine raises or hangs: 500 at once, `/health` 503, a check that raises."""

from __future__ import annotations

import asyncio
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from d3llm_ray.serving.app import DecoderReplica
from d3llm_ray.serving.schemas import CHAT, HEALTH
from tests.serving.life import count_ends, long_body, wait_until

HANG_S = 120


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_all_in_flight_get_a_500_and_the_replica_is_to_be_replaced(
    make_service: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    service = make_service(max_batch_size=2, step_timeout_s=1)
    counted = count_ends(service, monkeypatch)
    go, over = threading.Event(), threading.Event()

    def broken() -> Any:
        assert go.wait(30)
        if fault == "raises":
            raise RuntimeError("secret detail")
        over.wait(HANG_S)
        raise RuntimeError("too late")

    monkeypatch.setattr(service.llm.engine, "step", broken)
    replica: Any = types.SimpleNamespace(_service=service)
    with client_of(service) as client, ThreadPoolExecutor(4) as pool:
        bodies = [long_body(max_tokens=16, stream=stream) for stream in (False, True) * 2]
        answers = [pool.submit(client.post, CHAT, json=body) for body in bodies]
        wait_until(lambda: service.worker.in_flight == 4)  # two of them wait
        asyncio.run(DecoderReplica.check_health(replica))
        went = time.monotonic()
        go.set()
        responses = [answer.result(30) for answer in answers]
        # A forward that hangs has begun before, with the first request.
        assert time.monotonic() - went < 1 + (fault == "hangs")
        assert client.get(HEALTH).status_code == 503
        assert client.post(CHAT, json=long_body()).status_code == 503
        problem = "the engine has failed" if fault == "raises" else "a forward has not ended for 1 s"
        with pytest.raises(RuntimeError, match=problem):
            asyncio.run(DecoderReplica.check_health(replica))
        over.set()
    for response in responses:
        assert response.status_code == 500
        error = {"message": f"{problem}; ask again", "type": "server_error", "param": None, "code": "engine_failed"}
        assert response.json() == {"error": error}
    assert counted == {"accepted": 4, "failed": 4}
