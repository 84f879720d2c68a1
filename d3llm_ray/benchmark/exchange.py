"""One request and what came of it, over HTTP or offline: what every figure of a served model is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ANSWERED = "200"
Revelation = Mapping[int, tuple[int, str]]  # response position -> (0-based forward, text of the token)


@dataclass(frozen=True)
class Answered:
    """A whole answer. `revealed` is known only where it was asked for."""

    text: str
    finish_reason: str
    prompt_tokens: int
    tokens: int  # before the stop token
    forwards: int  # in which the request took part
    revealed: Revelation = field(default_factory=dict)


@dataclass(frozen=True)
class Exchange:
    """A request's times, in seconds of one clock, and its answer.

    `status`: the HTTP code, or "timeout", "connection" (none, or lost) or "broken" (a stream without its end). `first`
    is when the first text came, None where there is no stream.
    """

    prompt: int  # its number
    sent: float
    end: float
    status: str
    first: float | None = None
    answer: Answered | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.sent

    @property
    def first_seconds(self) -> float | None:
        return None if self.first is None else self.first - self.sent


@dataclass(frozen=True)
class Passage:
    """All exchanges of one pass over a load, what it took, and the processor time of the client."""

    exchanges: tuple[Exchange, ...]
    seconds: float
    client_seconds: float = 0.0

    @property
    def answered(self) -> list[Exchange]:
        return [exchange for exchange in self.exchanges if exchange.answer is not None]

    @property
    def tps(self) -> float:
        """Tokens of all answers a second."""
        return sum(e.answer.tokens for e in self.exchanges if e.answer is not None) / self.seconds
