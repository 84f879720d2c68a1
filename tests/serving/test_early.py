"""A small body goes with the head of its request, and whoever asks for it notices nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from d3llm_ray.serving.early import MOST_BYTES
from d3llm_ray.serving.exchange import whole_body
from d3llm_ray.serving.front import Front, TellsRoom
from d3llm_ray.serving.schemas import CHAT

SMALL = [{"type": "http.request", "body": b"a body", "more_body": False}]
PARTS = [{"type": "http.request", "body": b"a ", "more_body": True}, {"type": "http.request", "body": b"body"}]
LARGE = [{"type": "http.request", "body": b"a" * (MOST_BYTES + 1)}]


class Way:
    """Serve's proxy and a replica behind it: what was asked of the client, and when, and what the replica read."""

    def __init__(self, *, early_body: bool, told: bool = True) -> None:
        self.read, self.asked, self.called = b"", 0, 0
        replica = TellsRoom(self.replica, "app", "m", 2, 30.0)
        if not told:  # as those of a version before this
            replica._header = json.dumps({"application": "app", "model": "m", "room": 2, "slow_reader_s": 30.0})

        async def serve(scope: Any, receive: Any, send: Any) -> None:
            self.called = self.asked  # how much of the body had come by then
            await replica(scope, receive, send)

        self.front = Front(serve, lambda name: 1, early_body=early_body)

    async def replica(self, scope: Any, receive: Any, send: Any) -> None:
        self.read = await whole_body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask(self, messages: Sequence[Any]) -> None:
        left, self.asked = list(messages), 0

        async def receive() -> Any:
            self.asked += 1
            return left.pop(0)

        async def send(message: Any) -> None: ...

        await self.front({"type": "http", "method": "POST", "path": CHAT, "headers": []}, receive, send)


@pytest.mark.parametrize(
    ("early_body", "told", "messages", "first", "early"),
    [
        (True, True, SMALL, 1, 1),
        (True, True, PARTS, 1, 2),  # the first part is read, and given to the replica as it came
        (True, True, LARGE, 1, 1),
        (False, True, SMALL, 0, 1),  # a front before calls of replicas: the scope is not theirs
        (True, False, SMALL, 0, 1),  # replicas of another version
    ],
)
def test_the_replica_reads_the_same_body_whatever_goes_with_the_head(
    early_body: bool, told: bool, messages: Sequence[Any], first: int, early: int
) -> None:
    async def main() -> None:
        way = Way(early_body=early_body, told=told)
        for turn in range(2):  # before and after the front knows the replicas
            await way.ask(messages)
            assert way.read == b"".join(message["body"] for message in messages)
            assert way.asked == early
            assert way.called == (first if turn else 0)

    asyncio.run(main())


def test_a_body_with_the_head_is_not_asked_for_again() -> None:
    """That is what the way there and back was for."""
    scopes: list[Any] = []

    async def replica(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def main() -> None:
        way = Way(early_body=True)
        await way.ask(SMALL)
        way.front._app = replica
        await way.ask(SMALL)
        await way.ask(LARGE)

        async def nothing_comes() -> Any:
            raise AssertionError("it is in the scope")

        asked = TellsRoom(way.replica, "app", "m", 2, 30.0)

        async def send(message: Any) -> None: ...

        await asked(scopes[0], nothing_comes, send)
        assert way.read == b"a body"
        with pytest.raises(AssertionError):  # too large to go with the head
            await asked(scopes[1], nothing_comes, send)

    asyncio.run(main())
