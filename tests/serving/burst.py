"""A burst of requests at once, and health probes meanwhile, from one thread without a client library.

    python tests/serving/burst.py http://127.0.0.1:8000 tiny-llada [requests]

Client and server share the machine's cores, so the client must cost next to nothing: one non-blocking socket a
request, `Connection: close`, and an answer is whatever came before the server closed.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

CHAT = "/v1/chat/completions"
HEALTH_EVERY_S = 0.1
PATIENCE_S = 60.0


@dataclass
class Exchange:
    """One request and what came back; `seconds` from the burst's (a probe's: its own) beginning to the last byte."""

    request: bytes
    began: float
    received: bytearray = field(default_factory=bytearray)
    seconds: float | None = None  # None: no answer
    sent: int = 0

    @property
    def status(self) -> int:
        """The answer's HTTP status; 0 without one."""
        head = bytes(self.received[:12]).split(b" ")
        return int(head[1]) if self.seconds is not None and len(head) > 1 else 0

    def header(self, name: str) -> str | None:
        head = self.received.partition(b"\r\n\r\n")[0].decode("latin-1")
        lines = (line.partition(":") for line in head.split("\r\n")[1:])
        return next((value.strip() for key, _, value in lines if key.lower() == name), None)


@dataclass(frozen=True)
class Burst:
    chats: list[Exchange]
    probes: list[Exchange]

    def with_status(self, status: int) -> list[Exchange]:
        return [chat for chat in self.chats if chat.status == status]


def percentile(exchanges: Iterable[Exchange], share: float) -> float:
    """The smallest time within which `share` of the exchanges ended; infinite where one never did."""
    times = sorted(float("inf") if one.seconds is None else one.seconds for one in exchanges)
    return times[min(len(times) - 1, int(share * len(times)))] if times else 0.0


def send_burst(url: str, model: str, count: int, path: str = CHAT, **fields: object) -> Burst:
    """Send `count` chat requests at once and `GET /health` every 0.1 s until all have been answered."""
    address = urlsplit(url)
    target = (address.hostname or "127.0.0.1", address.port or 80)
    messages = [{"role": "user", "content": "Tom has 5 apples and buys 7 more. How many now?"}]
    body = json.dumps({"model": model, "messages": messages, **fields}).encode()
    head = f"Host: {target[0]}\r\nConnection: close\r\n"
    chat = f"POST {path} HTTP/1.1\r\n{head}Content-Type: application/json\r\nContent-Length: {len(body)}"
    chat_bytes = chat.encode() + b"\r\n\r\n" + body
    health_bytes = f"GET /health HTTP/1.1\r\n{head}\r\n".encode()
    waiting = selectors.DefaultSelector()
    open_chats = 0

    def begin(request: bytes) -> Exchange:
        exchange = Exchange(request, time.monotonic())
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(target)
        waiting.register(sock, selectors.EVENT_WRITE, exchange)
        return exchange

    def advance(key: selectors.SelectorKey) -> bool:
        """Send or receive what is possible; True when the exchange has ended."""
        sock, exchange = key.fileobj, key.data
        assert isinstance(sock, socket.socket)
        try:
            if exchange.sent < len(exchange.request):
                exchange.sent += sock.send(exchange.request[exchange.sent :])
                if exchange.sent == len(exchange.request):
                    waiting.modify(sock, selectors.EVENT_READ, exchange)
                return False
            data = sock.recv(65536)
            if data:
                exchange.received += data
                return False
            exchange.seconds = time.monotonic() - exchange.began
        except BlockingIOError:
            return False
        except OSError:
            pass  # reset or refused: no answer
        waiting.unregister(sock)
        sock.close()
        return True

    began = time.monotonic()
    chats = [begin(chat_bytes) for _ in range(count)]
    for exchange in chats:
        exchange.began = began
    chat_ids = {id(exchange) for exchange in chats}
    open_chats = count
    probes: list[Exchange] = []
    next_probe = began
    while (open_chats or waiting.get_map()) and time.monotonic() < began + PATIENCE_S:
        if open_chats and time.monotonic() >= next_probe:
            probes.append(begin(health_bytes))
            next_probe = time.monotonic() + HEALTH_EVERY_S
        for key, _ in waiting.select(0.02):
            if advance(key) and id(key.data) in chat_ids:
                open_chats -= 1
    for key in list(waiting.get_map().values()):
        sock = key.fileobj
        assert isinstance(sock, socket.socket)
        sock.close()
    waiting.close()
    return Burst(chats, probes)


def summary(burst: Burst) -> str:
    def line(name: str, exchanges: list[Exchange]) -> str:
        p50, p99, last = (percentile(exchanges, share) for share in (0.5, 0.99, 1.0))
        return f"{name:<12}{len(exchanges):>6}   p50 {p50:.2f} s   p99 {p99:.2f} s   last {last:.2f} s"

    counts = Counter(chat.status for chat in burst.chats)
    lines = [line(f"chat {status}", burst.with_status(status)) for status in sorted(counts)]
    for status in sorted({probe.status for probe in burst.probes}):
        lines.append(line(f"health {status}", [probe for probe in burst.probes if probe.status == status]))
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(send_burst(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1000)))
