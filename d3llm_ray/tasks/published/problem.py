"""How a published prompt becomes a problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from d3llm_ray.tasks.task import Message, Problem, problem_id

Style = Literal["chat", "raw"]


def make_problem(
    text: str, reference: str, user_id: str | int, style: Style, prefix: str = "", before: Sequence[Message] = ()
) -> Problem:
    """`text` as one user message behind the turns `before`, or as it is; `prefix` is how the answer begins.

    A raw prompt has its text as a message as well, for those who know messages only; its id says what it is.
    """
    messages = [*before, {"role": "user", "content": text}]
    begun = [{"role": "assistant", "content": prefix}] if prefix else []
    named = [{"role": style, "content": text}] if style == "raw" else messages
    return Problem(
        problem_id([*named, *begun], reference), messages, reference, user_id, text if style == "raw" else None, prefix
    )
