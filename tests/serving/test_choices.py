"""Several answers to a prompt: their seeds, their order, their usage, and the room that they need together."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.serving.choices import choice_seed
from d3llm_ray.serving.http import create_app
from d3llm_ray.serving.schemas import CHAT, COMPLETIONS
from d3llm_ray.serving.service import ChatService
from tests.serving.life import slow_down
from tests.serving.test_http_app import QUESTION, body, events

FIELDS: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 40, "diffusion": {"entropy_threshold": 1.0}}


def seeds(seed: int, count: int) -> list[int]:
    """docs/serving.md: the request's own, then the first 63 bits of BLAKE2b("SEED:CHOICE")."""
    digests = [hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=8).hexdigest() for choice in range(1, count)]
    return [seed, *(int(digest, 16) // 2 for digest in digests)]


@pytest.fixture(scope="module")
def offline(tiny_checkpoint: Path) -> DiffusionLLM:
    return DiffusionLLM.from_pretrained(tiny_checkpoint)


def test_seeds_of_choices_are_those_that_are_documented() -> None:
    assert [choice_seed(7, choice) for choice in range(8)] == seeds(7, 8)
    assert all(0 <= seed < 2**63 for seed in seeds(7, 8))
    assert len({*seeds(7, 8), *seeds(8, 8)}) == 16


def test_each_choice_is_the_offline_answer_with_its_seed(client: TestClient, offline: DiffusionLLM) -> None:
    answer = client.post(CHAT, json=body(n=5, **FIELDS)).json()
    choices = ChatCompletion.model_validate(answer).choices
    (prompt,) = {len(offline.encode(QUESTION))}
    expected = [
        offline.generate([QUESTION], 40, temperature=1.0, seed=seed, entropy_threshold=1.0)[0] for seed in seeds(7, 5)
    ]
    assert [choice.index for choice in choices] == list(range(5))
    assert [choice.message.content for choice in choices] == [one.text for one in expected]
    assert len({one.text for one in expected}) == 5
    tokens = sum(len(one.token_ids) for one in expected)
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "forwards": sum(one.forwards for one in expected),
        "tpf": round(tokens / sum(one.forwards for one in expected), 3),
    }
    alone = client.post(CHAT, json=body(n=1, **FIELDS)).json()
    assert alone["choices"] == answer["choices"][:1]


def test_the_streams_of_choices_add_up(client: TestClient) -> None:
    whole = client.post(CHAT, json=body(n=4, **FIELDS)).json()
    fields = {**FIELDS, "diffusion": {"entropy_threshold": 1.0, "events": True}}
    chunks = events(client.post(CHAT, json=body(n=4, stream=True, stream_options={"include_usage": True}, **fields)))
    texts, reasons, forwards = [""] * 4, [None] * 4, [0] * 4
    roles = [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:4]]
    assert roles == ["assistant"] * 4
    for chunk in chunks[:-1]:
        ChatCompletionChunk.model_validate(chunk)
        (choice,) = chunk["choices"]
        assert reasons[choice["index"]] is None, "nothing comes behind an end"
        texts[choice["index"]] += choice["delta"].get("content", "")
        reasons[choice["index"]] = choice["finish_reason"]
        if "diffusion" in chunk:
            assert chunk["diffusion"]["forward"] == forwards[choice["index"]]
            forwards[choice["index"]] += 1
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    assert sum(forwards) == whole["usage"]["forwards"]


def test_prompts_and_choices_come_in_openais_order(client: TestClient, offline: DiffusionLLM) -> None:
    prompts = [offline.encode(text) for text in ("2 + 3 ?", "7 * 6 ?", QUESTION)]
    fields = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "n": 2}
    answer = client.post(COMPLETIONS, json={"model": "tiny-random", "prompt": prompts, **fields}).json()
    Completion.model_validate(answer)
    expected = [
        offline.generate([prompt], 12, temperature=1.0, seed=seed)[0] for prompt in prompts for seed in seeds(3, 2)
    ]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["text"] for choice in answer["choices"]] == [one.text for one in expected]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_all_or_nothing(make_service: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    service: ChatService = make_service(max_batch_size=2, max_queue=2)
    with client_of(service) as client:
        for asked in ({"n": 5}, {"n": 8}):
            response = client.post(CHAT, json=body(**asked))
            assert (response.status_code, response.json()["error"]["param"]) == (400, "n")
            assert response.json()["error"]["message"].endswith("accepted: at most 4")
        many = {"model": "tiny-random", "prompt": [[5]] * 5}
        assert client.post(COMPLETIONS, json=many).json()["error"]["param"] == "prompt"
        assert client.post(CHAT, json=body(n=4, max_tokens=4)).status_code == 200
        monkeypatch.setattr(service.worker, "_open", {1, 2})
        for asked, status in (({"n": 3}, 429), ({"n": 2}, 200)):
            response = client.post(CHAT, json=body(max_tokens=4, **asked))
            assert response.status_code == status
            assert service.worker.in_flight == 2
            assert service.llm.engine.active == service.llm.engine.waiting == 0


def test_room_is_looked_at_again_when_the_prompts_are_tokens(make_service: Any) -> None:
    """Requests that are tokenised at the same time do not share a place."""
    service: ChatService = make_service(max_batch_size=1, max_queue=2)
    request = json.dumps(body(n=2, max_tokens=8)).encode()
    accepted: list[int] = []
    service._metrics.accepted = lambda: accepted.append(1)  # type: ignore[method-assign]

    async def ask() -> int:
        sent: list[Any] = []
        bodies = [request]

        async def receive() -> dict[str, Any]:
            while not bodies:  # the client stays
                await asyncio.sleep(60)
            return {"type": "http.request", "body": bodies.pop()}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b""}
        scope |= {"headers": [(b"content-type", b"application/json")]}
        await app(scope, receive, send)
        return int(sent[0]["status"])

    async def main() -> list[int]:
        service.start()
        statuses = await asyncio.gather(*(ask() for _ in range(3)))
        service.stop()
        return statuses

    app = create_app(service)
    assert sorted(asyncio.run(main())) == [200, 429, 429]
    assert len(accepted) == 2  # no part of what was refused


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_all_places(
    make_service: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    service: ChatService = make_service(max_batch_size=2)  # two decode, two wait
    slow_down(service, monkeypatch, 0.02)
    slowly = {"entropy_threshold": 0.0, "early_stop": False}
    request = json.dumps(body(n=4, stream=stream, max_tokens=64, diffusion=slowly)).encode()

    async def main() -> None:
        service.start()
        left, sent, messages = asyncio.Event(), [], [{"type": "http.request", "body": request}]

        async def receive() -> dict[str, Any]:
            if not messages:
                await left.wait()
                return {"type": "http.disconnect"}
            return messages.pop()

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "http_version": "1.1"}
        scope |= {"headers": [(b"content-type", b"application/json")]}
        task = asyncio.create_task(create_app(service)(scope, receive, send))
        while service.llm.engine.active < 2 or (stream and len(sent) < 7):
            await asyncio.sleep(0.005)
        assert service.worker.in_flight == 4
        if stream:
            left.set()
        else:
            task.cancel()
        await asyncio.wait({task}, timeout=5)
        assert service.worker.in_flight == 0
        await asyncio.sleep(0.1)
        assert service.llm.engine.active == service.llm.engine.waiting == 0
        service.stop()

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_one_failing_choice_fails_the_request(
    make_service: Any, client_of: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    service: ChatService = make_service()
    step, steps = service.llm.engine.step, []

    def broken() -> Any:
        steps.append(1)
        if len(steps) > 3:
            raise RuntimeError("secret")
        return step()

    monkeypatch.setattr(service.llm.engine, "step", broken)
    with client_of(service) as client:
        slowly = {"entropy_threshold": 0.0, "early_stop": False}
        response = client.post(CHAT, json=body(n=3, stream=stream, diffusion=slowly))
        assert response.status_code == (200 if stream else 500)
        assert "engine_failed" in response.text and "[DONE]" not in response.text
        assert service.worker.in_flight == 0
