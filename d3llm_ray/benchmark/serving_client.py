"""A client that measures: it keeps what comes and when, and reads it when the answer is whole.

`aiohttp`, which comes with Ray Serve, parses HTTP in C: a client beside its server must not take the server's time.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import aiohttp

from d3llm_ray.benchmark.exchange import ANSWERED, Answered, Exchange
from d3llm_ray.errors import InputError, WorkError, one_line, unknown
from d3llm_ray.serving.schemas import CHAT, HEALTH

DONE = b"data: [DONE]"
_DATA = b"data: "


class ServingClient:
    """Asks one model of a server. `fields` go into every request; with `events` also what each forward reveals."""

    def __init__(self, session: aiohttp.ClientSession, url: str, fields: Mapping[str, Any], stream: bool) -> None:
        self._session, self._url, self._stream = session, url, stream
        self._fields = dict(fields)
        if stream:
            self._fields |= {"stream": True, "stream_options": {"include_usage": True}}

    async def check_model(self, name: str) -> None:
        """Raise `InputError` unless the server has this model and takes the key, `WorkError` where none answers."""
        try:
            async with self._session.get(f"{self._url}/v1/models") as response:
                if response.status in (401, 403):
                    raise InputError(f"api_key_file: {self._url} refuses it; accepted: a key that the server knows")
                served = [card["id"] for card in (await response.json())["data"]]
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
            raise WorkError(f"{self._url}/v1/models does not answer with models: {one_line(error)}") from error
        if name not in served:
            raise unknown("served_model_name", name, served)

    async def round_trip(self) -> float:
        """Seconds of a request that a replica answers at once, `GET /health`, whatever it answers."""
        sent = perf_counter()
        async with self._session.get(f"{self._url}{HEALTH}") as response:
            await response.read()
        return perf_counter() - sent

    async def ask(
        self, prompt: int, messages: Sequence[Any], since: float | None = None, *, events: bool = False
    ) -> Exchange:
        """One exchange, whatever becomes of it; it counts from `since` on, where that is given."""
        body = {**self._fields, "messages": messages, **({"diffusion": {"events": True}} if events else {})}
        sent = perf_counter() if since is None else since
        try:
            async with self._session.post(f"{self._url}{CHAT}", json=body) as response:
                status = str(response.status)
                if status == ANSWERED and self._stream:
                    return await _stream(prompt, sent, response)
                text = await response.read()
        except TimeoutError:
            return Exchange(prompt, sent, perf_counter(), "timeout")
        except (aiohttp.ClientError, ConnectionError):
            return Exchange(prompt, sent, perf_counter(), "connection")
        answer = whole(json.loads(text)) if status == ANSWERED else None
        return Exchange(prompt, sent, perf_counter(), status, None, answer)


@asynccontextmanager
async def serving_client(
    url: str, key: str | None, fields: Mapping[str, Any], *, stream: bool, timeout_s: float
) -> AsyncIterator[ServingClient]:
    """A client with connections of its own, as many as it takes; `timeout_s` is for a whole answer."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        yield ServingClient(session, url, fields, stream)


async def _stream(prompt: int, sent: float, response: aiohttp.ClientResponse) -> Exchange:
    first: float | None = None
    data, read = b"", 0
    async for part in response.content.iter_any():
        data += part
        if first is None:
            now, end = perf_counter(), data.rfind(b"\n") + 1
            if any(_texts(chunk) for chunk in chunks(data[read:end])):
                first = now
            read = end
    end_s = perf_counter()
    answer = streamed(data)
    return Exchange(prompt, sent, end_s, "broken" if answer is None else ANSWERED, first, answer)


def chunks(data: bytes) -> list[dict[str, Any]]:
    """The JSON events of a stream, `[DONE]` left out."""
    lines = [line for line in data.split(b"\n") if line.startswith(_DATA) and not line.startswith(DONE)]
    return [json.loads(line[len(_DATA) :]) for line in lines]


def _texts(chunk: Mapping[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk.get("choices", ()))


def streamed(data: bytes) -> Answered | None:
    """The answer of a stream; None when it has no end, which is how the server tells of a failure."""
    if DONE not in data:
        return None
    found = chunks(data)
    revealed = {
        position: (chunk["diffusion"]["forward"], text)
        for chunk in found
        if chunk.get("diffusion")
        for position, text in zip(chunk["diffusion"]["positions"], chunk["diffusion"]["text"], strict=True)
    }
    reasons = [c["finish_reason"] for chunk in found for c in chunk["choices"] if c.get("finish_reason")]
    usage = next(chunk["usage"] for chunk in found if chunk.get("usage"))
    return _answered("".join(map(_texts, found)), reasons[-1], usage, revealed)


def whole(body: Mapping[str, Any]) -> Answered:
    """The answer of a response without a stream."""
    choice = body["choices"][0]
    return _answered(choice["message"]["content"], choice["finish_reason"], body["usage"], {})


def _answered(text: str, reason: str, usage: Mapping[str, Any], revealed: dict[int, tuple[int, str]]) -> Answered:
    return Answered(
        text, reason, usage["prompt_tokens"], usage["completion_tokens"], usage.get("forwards", 0), revealed
    )
