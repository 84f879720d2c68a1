"""A canvas as its reveal events tell of it, and as a terminal shows it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.containers import Lines
from rich.text import Text

from d3llm_ray.terminal import MASKED, legible

Color = Literal["entropy", "forward"]
CLOSED, OPEN, REVEALED, FROZEN = "·", MASKED, "▓", "█"
ENTROPY_STYLES = ((0.1, "bright_green"), (0.3, "green"), (0.6, "yellow"), (1.2, "dark_orange"))  # below so many nats
HIGH_ENTROPY_STYLE = "red"
FORWARD_STYLES = ("cyan", "magenta", "blue", "bright_cyan", "bright_magenta", "bright_blue")
_ROWS_AROUND = 3  # footer, and a line above and below


@dataclass(frozen=True)
class ShownToken:
    """What stands at a revealed position."""

    text: str
    entropy: float  # nats
    forward: int

    def style(self, color: Color) -> str:
        if color == "forward":
            return FORWARD_STYLES[self.forward % len(FORWARD_STYLES)]
        return next((style for below, style in ENTROPY_STYLES if self.entropy < below), HIGH_ENTROPY_STYLE)


@dataclass
class CanvasView:
    """Positions of one answer, the committed text before them, and the time it has taken. A rich renderable."""

    color: Color
    text: str = ""  # committed
    tokens: list[ShownToken | None] = field(default_factory=list)  # by position
    block_size: int = 1
    opened: int = 0
    frozen: int = 0
    forwards: int = 0
    began: float = field(default_factory=time.monotonic)

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take in one reveal event, as `serving.replies.Revealed` has them."""
        self.tokens += [None] * (event["size"] - len(self.tokens))
        self.block_size, self.opened, self.frozen = event["block_size"], event["opened"], event["frozen"]
        self.forwards = event["forward"] + 1
        for position, text, entropy in zip(event["positions"], event["text"], event["entropy"], strict=True):
            self.tokens[position] = ShownToken(legible(text).replace("\n", "⏎"), entropy, event["forward"])

    @property
    def revealed(self) -> int:
        return sum(token is not None for token in self.tokens)

    def cells(self) -> Text:
        """One cell a position, a gap between blocks."""
        cells = Text()
        for position, token in enumerate(self.tokens):
            if position and position % self.block_size == 0:
                cells.append(" ")
            if token is None:
                cells.append(OPEN if position < self.opened else CLOSED, "dim")
            else:
                cells.append(FROZEN if position < self.frozen else REVEALED, token.style(self.color))
        return cells

    def answer(self) -> Text:
        """The committed text, and behind it what is revealed between masks."""
        first = next((position for position, token in enumerate(self.tokens) if token is None), len(self.tokens))
        answer = Text(legible(self.text))
        for token in self.tokens[first : self.opened]:
            answer.append(MASKED if token is None else token.text, "dim" if token is None else token.style(self.color))
        return answer

    def footer(self) -> Text:
        """Forwards, tokens per forward and tokens a second, so far."""
        seconds = max(time.monotonic() - self.began, 1e-6)
        tpf = self.revealed / self.forwards if self.forwards else 0.0
        return Text(
            f"forward {self.forwards}  {self.revealed}/{len(self.tokens)} positions  TPF {tpf:.2f}  "
            f"{self.revealed / seconds:.0f} tokens/s  colour: {self.color}",
            "dim",
            no_wrap=True,
            overflow="ellipsis",
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The end of the answer that the screen has room for, the cells and the footer."""
        cells = self.cells().wrap(console, options.max_width) if self.tokens else Lines()
        room = max(console.height - len(cells) - _ROWS_AROUND, 1)
        yield from self.answer().wrap(console, options.max_width)[-room:]
        if self.tokens:
            yield from cells[-max(console.height - _ROWS_AROUND, 1) :]
            yield self.footer()
