"""One row's unmasking as text: the answer with its masked places, after every forward that revealed something."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from d3llm_ray.models.chat import control_tokens
from d3llm_ray.terminal import MASKED, legible

PRINTED_FRAMES = 8  # where nothing can be drawn in place
ENTER, LEAVE, HOME = "\x1b[?1049h", "\x1b[?1049l", "\x1b[H\x1b[J"  # the terminal's second screen; its start, cleared
INVERSE, PLAIN = "\x1b[7m", "\x1b[27m"


@dataclass(frozen=True)
class Unmasking:
    """One trajectory, ready to be shown."""

    prompt_id: str
    texts: list[str]  # what every position adds to the answer; its id without a tokenizer
    token_ids: NDArray[np.int64]  # [canvas]
    special: NDArray[np.bool_]  # [canvas]: a token that stands for no text
    steps: NDArray[np.int64]  # [canvas]: 0-based forward
    entropy: NDArray[np.float64] | None  # [canvas], nats when it was revealed
    forwards: int
    block_size: int  # the canvas where it is unknown

    @classmethod
    def of(cls, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, block_size: int | None) -> Unmasking:
        """From a row of `schema.SCHEMA` whose `reveal_step` is not null."""
        ids, entropy = row["response_ids"], row["reveal_entropy"]
        special = [] if tokenizer is None else list(control_tokens(tokenizer).values())
        return cls(
            prompt_id=row["prompt_id"],
            texts=[f" {token}" for token in ids] if tokenizer is None else token_texts(tokenizer, ids),
            token_ids=np.array(ids),
            special=np.isin(ids, special),
            steps=np.array(row["reveal_step"], np.int64),
            entropy=None if entropy is None else np.array(entropy, np.float64),
            forwards=row["forwards"],
            block_size=block_size or len(ids),
        )

    @property
    def moments(self) -> list[int]:
        """The forwards that revealed something, in order; before them -1, when everything is masked."""
        return [-1, *np.unique(self.steps).tolist()]

    def frame(self, step: int, mark: bool = False) -> str:
        """The answer after forward `step` (0-based), under a line that says how far it is.

        `mark` shows what this forward revealed in inverse video. A run of one special token is shown as a count.
        """
        revealed = self.steps <= step
        lines = [f"forward {step + 1} of {self.forwards}, {revealed.sum()} of {revealed.size} positions revealed\n"]
        run = np.where(revealed & self.special, self.token_ids, -1 - np.arange(revealed.size))
        for _, group in groupby(range(revealed.size), key=lambda position: run[position]):
            first, *more = group
            text = self.texts[first] if revealed[first] else MASKED
            text += f"×{len(more) + 1}" if more else ""
            is_new = mark and (self.steps[[first, *more]] == step).any()
            lines.append(f"{INVERSE}{text}{PLAIN}" if is_new else text)
        return "".join(lines)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What every token adds to a text, its leading space included; a special token's own name.

    Control characters are replaced: an answer may not steer the terminal.
    """
    texts: dict[int, str] = {}
    special = set(control_tokens(tokenizer).values())
    for token in set(ids):
        alone, twice = (str(tokenizer.decode([token] * n, clean_up_tokenization_spaces=False)) for n in (1, 2))
        # The first token of a text may lose its space, the second does not.
        texts[token] = legible(alone if token in special else twice[len(alone) :])
    return [texts[token] for token in ids]


def play(unmasking: Unmasking, delay_s: float, stream: TextIO) -> None:
    """Show the answer fill up: on a terminal in place, `delay_s` seconds a frame; elsewhere a few frames in a row."""
    moments = unmasking.moments
    if not stream.isatty():
        chosen = np.linspace(0, len(moments) - 1, min(PRINTED_FRAMES, len(moments))).round().astype(int)
        stream.write("".join(f"{unmasking.frame(moments[index])}\n\n" for index in chosen))
        return
    stream.write(ENTER)
    try:
        for step in moments:
            stream.write(f"{HOME}{unmasking.frame(step, mark=True)}\n")
            stream.flush()
            time.sleep(delay_s)
    finally:
        stream.write(LEAVE)
    stream.write(f"{unmasking.frame(moments[-1])}\n\n")
