"""The answers to one request: several to each of its prompts, as they grow side by side."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

from d3llm_ray.serving.access_log import note_answers
from d3llm_ray.serving.answers import Answer, Piece
from d3llm_ray.serving.replies import Usage


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one of several answers to a prompt: the request's own for the first, so that `n` changes nothing.

    Of the others the first 63 bits of BLAKE2b("SEED:CHOICE"): requests with neighbouring seeds share no answer.
    """
    if not choice:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=8).digest()) >> 1


class Answers:
    """`each` answers to every prompt, in the order of the prompts. Close them however they end."""

    def __init__(self, answers: Sequence[Answer], each: int) -> None:
        self.answers, self._each = answers, each
        self._waiting: dict[asyncio.Task[Piece | None], int] = {}
        self._ready: list[asyncio.Task[Piece | None]] = []
        for index in range(len(answers)):
            self._wait_for(index)

    async def next(self) -> tuple[int, Piece | None] | None:
        """The next that comes: which answer, and its next piece or None at its end. None when all have ended.

        Raises the `ApiError` of the first answer that fails.
        """
        if not self._waiting:
            usage = self.usage()
            reasons = {str(answer.finish_reason) for answer in self.answers}
            note_answers(usage.prompt_tokens, usage.completion_tokens, usage.forwards, ",".join(sorted(reasons)))
            return None
        if not self._ready:
            done, _ = await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)
            self._ready = sorted(done, key=self._waiting.__getitem__)
        task = self._ready.pop(0)
        index = self._waiting.pop(task)
        piece = task.result()
        if piece is not None:
            self._wait_for(index)
        return index, piece

    @property
    def ready(self) -> bool:
        """Whether something has come, or all have ended: `next` then waits for nobody, save a piece without a text."""
        return not self._waiting or bool(self._ready) or any(self.answers[i].ready for i in self._waiting.values())

    def _wait_for(self, index: int) -> None:
        self._waiting[asyncio.ensure_future(self.answers[index].next())] = index

    def close(self) -> None:
        """Free the slots of those that are not complete."""
        for task in self._waiting:
            if not task.cancel() and not task.cancelled():
                task.exception()  # looked at, so that nobody complains that none did
        for answer in self.answers:
            answer.close()

    def usage(self) -> Usage:
        """Of all answers together, once they have ended: each prompt counts once, however many answers it has."""
        told = [answer.usage for answer in self.answers if answer.usage is not None]
        return Usage.count(
            sum(usage.prompt_tokens for usage in told[:: self._each]),
            sum(usage.completion_tokens for usage in told),
            sum(usage.forwards for usage in told),
        )
