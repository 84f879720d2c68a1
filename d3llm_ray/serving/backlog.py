"""What the engine has told of a request and nobody has read yet."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace

from d3llm_ray.decoding import Event


class Backlog:
    """Events of one request in their order, for one reader; an exception is the last.

    What waits is merged, as committed tokens are only ever added to: however slowly it is read, no more waits than one
    event with the answer's tokens, once. Events that tell of reveals stay apart; there is one for each forward.
    """

    def __init__(self) -> None:
        self._items: deque[Event | Exception] = deque()
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Event | Exception) -> None:
        last = self._items[-1] if self._items else None
        if isinstance(item, Event) and isinstance(last, Event) and _merges(last) and _merges(item):
            self._items[-1] = replace(item, token_ids=[*last.token_ids, *item.token_ids])
        else:
            self._items.append(item)
        self._filled.set()

    async def get(self) -> Event | Exception:
        """Wait for the next event, or what ended the request instead."""
        await self._filled.wait()
        item = self._items.popleft()
        if not self._items:
            self._filled.clear()
        return item


def _merges(event: Event) -> bool:
    return event.reveal is None and event.error is None
