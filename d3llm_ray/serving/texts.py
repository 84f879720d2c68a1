"""A served model's tokenizer: what takes a while runs on a thread of its own, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.errors import InputError
from d3llm_ray.models.chat import encode_text
from d3llm_ray.serving.errors import ApiError, bad_input
from d3llm_ray.serving.schemas import COMPLETIONS, Message

T = TypeVar("T")
# No prompt that fits has so many, and to tokenise what cannot fit would keep others waiting: seconds for a megabyte.
MOST_CHARACTERS_A_TOKEN = 32


class Texts:
    """From texts to token ids and back, one at a time; `ApiError` for what the model's tokenizer refuses."""

    def __init__(self, llm: DiffusionLLM) -> None:
        self._llm = llm
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def of_messages(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, by the model's chat template."""
        self.check("messages")
        self._check_length("messages", sum(len(message.content) for message in messages))
        plain = [{"role": message.role, "content": message.content} for message in messages]
        return await self._run(lambda: self._llm.encode(plain))

    async def of_text(self, text: str) -> list[int]:
        """Token ids of a text: nothing is added, and the names of control tokens in it are read as text."""
        tokenizer = self.check("prompt")
        self._check_length("prompt", len(text))
        return await self._run(lambda: encode_text(tokenizer, text, control=False))

    async def decoded(self, token_ids: Sequence[int], param: str) -> str:
        """The text of token ids that a request holds in `param`, special tokens by their names."""
        tokenizer, size = self.check(param), self._llm.model.config.vocab_size
        if any(token >= size for token in token_ids):
            raise bad_input(InputError(f"{param}: got an id out of range; accepted: ids from 0 to {size - 1}"))
        return await self._run(lambda: str(tokenizer.decode(list(token_ids))))

    def token(self, token_id: int) -> str:
        """The text of one token; without a tokenizer its number, as vLLM writes it."""
        tokenizer = self._llm.tokenizer
        return f"token_id:{token_id}" if tokenizer is None else str(tokenizer.decode([token_id]))

    def _check_length(self, param: str, characters: int) -> None:
        context = self._llm.engine.context
        most = MOST_CHARACTERS_A_TOKEN * context
        if characters > most:
            accepted = (
                f"at most {most}, {MOST_CHARACTERS_A_TOKEN} for each of the {context} tokens of the model's context"
            )
            message = f"{param}: got {characters} characters; accepted: {accepted}"
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    def check(self, param: str) -> PreTrainedTokenizerBase:
        """The tokenizer, which the request's field `param` needs; `ApiError` where the model has none."""
        if self._llm.tokenizer is None:
            message = f"{param}: this model has no tokenizer; accepted: token ids as the prompt of {COMPLETIONS}"
            raise ApiError(400, message, param=param, code="no_tokenizer")
        return self._llm.tokenizer

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except InputError as error:
            raise bad_input(error) from error
