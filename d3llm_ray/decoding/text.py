"""From committed token ids to text that never has to be taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an unfinished character to


class CommittedText:
    """Decodes a growing list of token ids, and ends it at the first stop string.

    The whole list is decoded each time: how a token reads can depend on every token before it (a skipped special
    token, a stripped space), and an answer is a few hundred tokens in a few dozen steps. `decode(ids)` must extend
    `decode(ids[:k])` except in a tail of replacement characters.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._sent = ""
        self._stop_tokens: int | None = None

    @property
    def stopped(self) -> bool:
        """True once a stop string has been met: nothing after it is ever shown."""
        return self._stop_tokens is not None

    @property
    def text(self) -> str:
        """What is certain so far."""
        return self._sent

    @property
    def tokens(self) -> int:
        """Tokens of the answer; with a stop string, up to and including the one that completed it."""
        return len(self._ids) if self._stop_tokens is None else self._stop_tokens

    def push(self, ids: Sequence[int]) -> str:
        """Append committed tokens; return the new text that is certain."""
        return self._extend(ids, hold=True)

    def finish(self) -> str:
        """Return what was held back; the answer has no more tokens."""
        return self._extend((), hold=False)

    def _extend(self, ids: Sequence[int], *, hold: bool) -> str:
        if self.stopped:
            return ""
        before = len(self._ids)
        self._ids.extend(ids)
        text = self._decode(self._ids)
        cut = self._find_stop(text)
        if cut is not None:
            self._stop_tokens = self._tokens_until_stop(before)
            text = text[:cut]
        elif hold:
            text = self._settled(text)
        if not text.startswith(self._sent):
            return ""
        new = text[len(self._sent) :]
        self._sent = text
        return new

    def _find_stop(self, text: str) -> int | None:
        """Where the match that is complete first begins: the same however the tokens arrived."""
        # A partial match is never sent, so that a stop string starts at or after what was.
        begins = [
            (begin + len(stop), begin) for stop in self._stops if (begin := text.find(stop, len(self._sent))) >= 0
        ]
        return min(begins)[1] if begins else None

    def _tokens_until_stop(self, before: int) -> int:
        for count in range(before + 1, len(self._ids)):
            if self._find_stop(self._decode(self._ids[:count])) is not None:
                return count
        return len(self._ids)

    def _settled(self, text: str) -> str:
        text = text.rstrip(REPLACEMENT)
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
