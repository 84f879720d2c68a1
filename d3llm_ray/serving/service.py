"""One served model: from a checked chat request to the committed text of its answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from d3llm_ray.decoding import Decoder, DiffusionLLM, Request
from d3llm_ray.decoding.request import Reveal
from d3llm_ray.decoding.text import CommittedText
from d3llm_ray.errors import InputError, require
from d3llm_ray.metrics import ServingMetrics
from d3llm_ray.serving.answers import Answer
from d3llm_ray.serving.bounds import check_overrides
from d3llm_ray.serving.counted import CountedRunner
from d3llm_ray.serving.errors import RETRY_AFTER_S, ApiError, bad_input, queue_full
from d3llm_ray.serving.replies import ModelCard, Revealed
from d3llm_ray.serving.schemas import MAX_SEED, ChatRequest
from d3llm_ray.serving.settings import ReplicaSettings
from d3llm_ray.serving.worker import EngineFailure, EngineWorker, Overloaded

WARM_UP_TOKENS = 1


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except Overloaded as error:
        raise queue_full() from error
    except EngineFailure as error:
        raise ApiError(503, str(error), code="engine_failed", retry_after_s=RETRY_AFTER_S) from error


class ChatService:
    """A model with its engine's worker. Make one on a thread, `start` it on the event loop."""

    def __init__(self, settings: ReplicaSettings) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.llm = DiffusionLLM.from_pretrained(
            settings.model, settings.decoding(), settings.dtype, settings.device, settings.max_batch_size
        )
        require(
            self.llm.tokenizer is not None, "model", settings.model, "a checkpoint with a tokenizer and chat template"
        )
        self.llm.generate(["1"], max_tokens=WARM_UP_TOKENS)  # the first request should not pay for lazy set-up
        metrics = ServingMetrics(settings.model_id)
        self.llm.engine.runner = CountedRunner(self.llm.engine.runner, metrics)
        self.worker = EngineWorker(self.llm.engine, settings.room, metrics, settings.step_timeout_s)
        self._metrics = metrics
        # Long prompts take a while to tokenise: not on the event loop, and one at a time.
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")

    def start(self) -> None:
        self.worker.start()

    def stop(self) -> None:
        self.worker.stop()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    def card(self) -> ModelCard:
        """What `GET /v1/models` tells of this model."""
        decoder = self.llm.engine.decoder
        return ModelCard(
            id=self.settings.model_id,
            created=self.created,
            max_model_len=self.llm.engine.context,
            max_tokens_limit=self.settings.max_tokens_limit,
            decoder=decoder.name,
            decoder_settings={**decoder.settings(), "block_size": decoder.block_size or self.llm.family.block_size},
        )

    async def open(self, request: ChatRequest) -> Answer:
        """Check a request against the model and queue it; `ApiError` when it is refused."""
        self.check_model(request.model)
        self._check_answer_length(request)
        decoder = self._decoder(request)
        self.check_room()  # before the work of tokenising
        try:
            engine_request = await self._engine_request(request, decoder)
            self.llm.engine.check(engine_request)
        except InputError as error:
            raise bad_input(error) from error
        with _refusals():
            submission = self.worker.submit(engine_request)
        return Answer(submission, CommittedText(self.llm.decode, request.stop), self._metrics)

    def check_room(self) -> None:
        """Raise the `ApiError` that a request would be refused with now, whatever it asks."""
        with _refusals():
            self.worker.check_room()

    async def _engine_request(self, request: ChatRequest, decoder: Decoder | None) -> Request:
        prompt_ids = await self._encode(request)
        return Request(
            prompt_ids,
            max_tokens=self._max_tokens(request, len(prompt_ids)),
            temperature=request.temperature or 0.0,
            seed=secrets.randbelow(MAX_SEED) if request.seed is None else request.seed,
            decoder=decoder,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=request.top_k or 0,
            stop_token_ids=request.stop_token_ids or (),
            ignore_eos=bool(request.ignore_eos),
            reveals=request.wants_events,
        )

    def revealed(self, reveal: Reveal) -> Revealed:
        """A forward's reveals as a client reads them: a text for each token, special tokens by their names."""
        assert self.llm.tokenizer is not None
        return Revealed(
            forward=reveal.forward,
            positions=reveal.positions,
            text=[str(self.llm.tokenizer.decode([token])) for token in reveal.token_ids],
            entropy=[round(entropy, 4) for entropy in reveal.entropies],
            size=reveal.size,
            block_size=reveal.block_size,
            opened=reveal.opened,
            frozen=reveal.frozen,
        )

    def check_model(self, name: str) -> None:
        """Raise 404 unless `name` is the served model's."""
        if name != self.settings.model_id:
            message = f"model: {name[:200]!r} is not served here; accepted: {self.settings.model_id}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _check_answer_length(self, request: ChatRequest) -> None:
        wanted, limit = request.wanted_tokens, self.settings.max_tokens_limit
        if wanted is not None and wanted > limit:
            name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
            raise ApiError(400, f"{name}: got {wanted}; accepted: 1 to {limit}", param=name, code="invalid_value")

    def _decoder(self, request: ChatRequest) -> Decoder | None:
        if not request.overrides:
            return None
        usual, limit = self.llm.engine.decoder, self.settings.max_tokens_limit
        wanted = request.wanted_tokens or self.settings.max_tokens
        try:
            check_overrides(request.overrides, usual, self.llm.family, wanted, limit)
            return usual.override(**request.overrides)
        except InputError as error:
            raise bad_input(error, "diffusion.") from error

    async def _encode(self, request: ChatRequest) -> list[int]:
        messages = [{"role": message.role, "content": message.content} for message in request.messages]
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, self.llm.encode, messages)

    def _max_tokens(self, request: ChatRequest, prompt_tokens: int) -> int:
        """The answer length asked for, or as much of the default as the context has room for."""
        context = self.llm.engine.context
        wanted = request.wanted_tokens
        if prompt_tokens + (wanted or 1) <= context:
            return wanted or min(self.settings.max_tokens, context - prompt_tokens)
        message = (
            f"messages: the prompt's {prompt_tokens} tokens and max_tokens {wanted or 1} exceed the model's context; "
            f"accepted: together at most {context} tokens"
        )
        raise ApiError(400, message, param="messages", code="context_length_exceeded")
