"""A client by hand, which leaves or dawdles when the test says so: HTTP/1.1 over asyncio's streams."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any, Self
from urllib.parse import urlsplit

from d3llm_ray.serving.schemas import CHAT


class RawClient:
    """One connection with one chat request on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self._writer = reader, writer

    @classmethod
    async def ask(cls, url: str, body: dict[str, Any], receive_buffer: int | None = None) -> Self:
        """Connect and send the whole request. `receive_buffer`: bytes that the kernel keeps for this client, about."""
        address = urlsplit(url)
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (address.hostname, address.port))
        reader, writer = await asyncio.open_connection(sock=connection, limit=receive_buffer or 2**16)
        content = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        return cls(reader, writer)

    async def status(self) -> int:
        """Wait for the status of the answer."""
        return int((await self.reader.readline()).split()[1])

    async def read_all(self) -> str:
        """The rest of a streamed answer, with the framing of its chunks; raises when the connection is cut."""
        return (await self.reader.readuntil(b"\r\n0\r\n\r\n")).decode()

    def leave(self) -> None:
        """End the connection at once, as a process that is killed does."""
        self._writer.transport.abort()
