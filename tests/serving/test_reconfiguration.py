"""`user_config`: other decoding settings for what comes later, in replicas that go on."""

from __future__ import annotations

import asyncio
import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from d3llm_ray import config
from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.errors import InputError
from d3llm_ray.serving.app import DecoderReplica
from d3llm_ray.serving.reconfiguration import UserConfig
from d3llm_ray.serving.schemas import CHAT
from d3llm_ray.serving.service import ChatService

QUESTION = [{"role": "user", "content": "2 + 3 ?"}]
VANILLA = {"decoder": "vanilla"}


class Replica:
    """A replica as Serve calls it, once its constructor has run."""

    reconfigure, check_health = DecoderReplica.reconfigure, DecoderReplica.check_health

    def __init__(self, service: Any) -> None:
        self._service, self._runs = service, False


def ask(client: TestClient, **fields: Any) -> tuple[str, int]:
    answer = client.post(CHAT, json={"model": "tiny-random", "messages": QUESTION, "max_tokens": 64, **fields}).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["forwards"]


def offline(path: Path, decoder: str | None = None, **settings: Any) -> tuple[str, int]:
    (output,) = DiffusionLLM.from_pretrained(path, decoder, **settings).generate([QUESTION], max_tokens=64)
    return output.text, output.forwards


def test_what_comes_later_is_decoded_with_the_new_settings(
    make_service: Callable[..., ChatService], client_of: Any, tiny_checkpoint: Path
) -> None:
    service = make_service(decoder_settings={"entropy_threshold": 0.3})
    replica: Any = Replica(service)
    with client_of(service) as client:
        assert ask(client) == offline(tiny_checkpoint, entropy_threshold=0.3)
        steps: list[tuple[dict[str, Any], tuple[str, int]]] = [
            (VANILLA, offline(tiny_checkpoint, "vanilla")),
            ({"decoder_settings": {"cache_delay": 2}}, offline(tiny_checkpoint, entropy_threshold=0.3, cache_delay=2)),
            ({"decoder": "d3llm"}, offline(tiny_checkpoint, "d3llm")),
            ({}, offline(tiny_checkpoint, entropy_threshold=0.3)),
        ]
        assert len({answer[1] for _, answer in steps}) > 2
        for user_config, expected in steps:
            asyncio.run(replica.reconfigure(user_config))
            assert ask(client) == expected
        asyncio.run(replica.reconfigure(VANILLA))
        card = client.get("/v1/models/tiny-random").json()
        assert (card["decoder"], card["decoder_settings"]["steps"]) == ("vanilla", service.decoder.settings()["steps"])
        fewer = service.decoder.override(steps=8)
        expected = DiffusionLLM.from_pretrained(tiny_checkpoint, fewer).generate([QUESTION], max_tokens=64)[0]
        assert ask(client, diffusion={"steps": 8}) == (expected.text, expected.forwards)  # a request's own go on top


def test_requests_in_flight_finish_with_the_settings_they_came_under(
    make_service: Callable[..., ChatService], client_of: Any, tiny_checkpoint: Path
) -> None:
    """One is decoded, one waits; the change comes before the first forward of either."""
    from d3llm_ray.serving.schemas import ChatRequest

    service = make_service(max_batch_size=1)
    body = ChatRequest(model="tiny-random", messages=QUESTION, max_tokens=64)  # type: ignore[arg-type]

    async def main() -> list[tuple[str, int]]:
        answers = [await service.open(body), await service.open(body)]
        service.reconfigure(UserConfig(**VANILLA))
        answers.append(await service.open(body))
        service.start()
        texts = []
        for answer in answers:
            parts = []
            while (step := await answer.next()) is not None:
                parts.append(step[1].text if step[1] else "")
            texts.append(("".join(parts), answer.usage().forwards))
        await asyncio.to_thread(service.stop)
        return texts

    old, new = offline(tiny_checkpoint), offline(tiny_checkpoint, "vanilla")
    assert old[1] != new[1]
    assert asyncio.run(main()) == [old, old, new]


@pytest.mark.parametrize(
    ("user_config", "message"),
    [
        ({"decodre": "vanilla"}, "decodre: unknown setting; accepted: decoder, decoder_settings, adapter"),
        ({"decoder": "d4llm"}, "decoder: unknown value 'd4llm'; accepted: "),
        ({"decoder": "autoregressive"}, "decoder: 'autoregressive' cannot decode a 'llada' model"),
        ({"decoder_settings": {"speed": 3}}, "speed: no setting of decoder 'd3llm'"),
        ({"adapter": "mine"}, "adapter: unknown value 'mine'; accepted: "),
        ({"decoder": "missing.yaml"}, "decoder: cannot read 'missing.yaml'"),
    ],
)
def test_a_bad_one_keeps_a_replica_from_starting_and_changes_nothing_in_one_that_runs(
    service: ChatService, caplog: pytest.LogCaptureFixture, user_config: dict[str, Any], message: str
) -> None:
    replica: Any = Replica(types.SimpleNamespace(**vars(service)))
    replica._service.reconfigure = lambda given: ChatService.reconfigure(replica._service, given)
    replica._service.worker = types.SimpleNamespace(problem=lambda: None)
    before = replica._service.decoder
    with pytest.raises(InputError) as error:
        asyncio.run(replica.reconfigure(user_config))
    assert str(error.value).startswith(f"user_config: {message}") and "\n" not in str(error.value)
    asyncio.run(replica.check_health())
    with caplog.at_level(logging.ERROR, "d3llm_ray.serving"):
        asyncio.run(replica.reconfigure(user_config))
    assert f"the one before it stays: {message}" in caplog.text
    assert replica._service.decoder is before
    asyncio.run(replica.reconfigure(VANILLA))
    assert replica._service.decoder.name == "vanilla"


def test_settings_of_a_user_config() -> None:
    assert config.build(UserConfig, {}) == UserConfig(decoder=None, decoder_settings={}, adapter=None)
