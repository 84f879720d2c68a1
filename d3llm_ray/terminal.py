"""Text of a model on a terminal: it may not steer it."""

from __future__ import annotations

MASKED = "░"


def legible(text: str) -> str:
    """`text` with every character that a terminal would obey, newlines aside, replaced."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text.replace("\t", "    ")
    )
