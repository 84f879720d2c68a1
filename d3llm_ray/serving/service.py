"""One served model: from a checked request to the answers that grow."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from d3llm_ray.decoding import Decoder, DiffusionLLM, Request
from d3llm_ray.decoding.request import Reveal
from d3llm_ray.decoding.text import CommittedText
from d3llm_ray.errors import InputError, unknown
from d3llm_ray.metrics import ServingMetrics
from d3llm_ray.serving.access_log import note_model
from d3llm_ray.serving.adapters import AdaptedRequest, with_adapters
from d3llm_ray.serving.answers import Answer
from d3llm_ray.serving.auth import KeyRing
from d3llm_ray.serving.bounds import check_overrides
from d3llm_ray.serving.choices import Answers, choice_seed
from d3llm_ray.serving.counted import CountedRunner
from d3llm_ray.serving.deadline import Deadline, DeadlinePassed
from d3llm_ray.serving.errors import RETRY_AFTER_S, ApiError, bad_input, model_not_found, out_of_time, queue_full
from d3llm_ray.serving.reconfiguration import UserConfig
from d3llm_ray.serving.replies import ModelCard, Revealed
from d3llm_ray.serving.schemas import MAX_SEED, ChatRequest, CompletionRequest, GenerationRequest
from d3llm_ray.serving.settings import ReplicaSettings
from d3llm_ray.serving.texts import Texts
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
    except DeadlinePassed as error:
        raise out_of_time(error) from error


class ChatService:
    """A model with its engine's worker. Make one on a thread, `start` it on the event loop."""

    def __init__(self, settings: ReplicaSettings) -> None:
        self.settings = settings
        self.keys = KeyRing.of(settings)
        self.created = int(time.time())
        llm = DiffusionLLM.from_pretrained(
            settings.model, settings.decoding(), settings.dtype, settings.device, settings.max_batch_size
        )
        self.llm = with_adapters(llm, settings.adapters)
        self._presets = settings.request_presets()
        warm_up = [self.llm.family.eos_token_id]
        self.llm.generate([warm_up], max_tokens=WARM_UP_TOKENS)  # the first request should not pay for lazy set-up
        # Of requests that name no other; `reconfigure` changes them.
        self.decoder = self.llm.engine.decoder
        self.adapter: str | None = None
        metrics = ServingMetrics(settings.model_id)
        self.llm.engine.runner = CountedRunner(self.llm.engine.runner, metrics)
        self.worker = EngineWorker(self.llm.engine, settings.room, metrics, settings.step_timeout_s)
        self._metrics = metrics
        self.texts = Texts(self.llm)

    def start(self) -> None:
        self.worker.start()

    def stop(self) -> None:
        self.worker.stop()
        self.texts.close()

    def reconfigure(self, user_config: UserConfig) -> None:
        """Decode with other settings what comes from now on; `InputError`, and no change, where they do not fit."""
        adapter = user_config.adapter_of(self.settings)
        self.decoder, self.adapter = user_config.decoding(self.settings, self.llm.family), adapter

    def cards(self) -> list[ModelCard]:
        """What `GET /v1/models` tells: of the model, and of its adapters."""
        own = self.card()
        return [
            own,
            *(
                own.model_copy(update={"id": name, "parent": own.id, "adapter": name})
                for name in self.settings.adapters
            ),
        ]

    def card(self) -> ModelCard:
        """What `GET /v1/models` tells of this model."""
        usual = self.decoder.name
        settings = {name: self._settings_of(decoder) for name, decoder in self.decoders.items()}
        return ModelCard(
            id=self.settings.model_id,
            created=self.created,
            max_model_len=self.llm.engine.context,
            max_tokens_limit=self.settings.max_tokens_limit,
            decoder=usual,
            decoder_settings=settings[usual],
            decoders=list(settings),
            settings_by_decoder=settings,
            adapter=self.adapter,
        )

    def _settings_of(self, decoder: Decoder) -> dict[str, Any]:
        return {**decoder.settings(), "block_size": decoder.block_size or self.llm.family.block_size}

    @property
    def decoders(self) -> dict[str, Decoder]:
        """What a request may name: the server's own decoder, as its operator has set it, and presets."""
        usual = self.decoder
        return {usual.name: usual, **{name: preset for name, preset in self._presets.items() if name != usual.name}}

    def unready(self) -> str | None:
        """Why this replica would take no request, or None."""
        return self.worker.problem()

    async def open(self, request: GenerationRequest) -> Answers:
        """Check a request against the model and queue all that it asks for; `ApiError` when it is refused."""
        deadline = Deadline(self.settings.request_timeout_s)
        self.check_model(request.model)
        note_model(request.model)
        self._check_answer_length(request)
        self._check_count(request)
        if request.stop:
            self.texts.check("stop")
        decoder, adapter = self._decoder(request), self._adapter(request.model)
        count = request.prompts * request.choices
        self.check_room(count)  # before the work of tokenising
        seed = secrets.randbelow(MAX_SEED) if request.seed is None else request.seed
        with _refusals():
            async with deadline:
                prompts = await self._prompts(request)
        asked: list[Request] = []
        for where, ids in prompts.items():
            first = AdaptedRequest.of(self._engine_request(request, where, ids, decoder, seed), adapter)
            try:
                self.llm.engine.check(first)
            except InputError as error:
                raise bad_input(InputError(re.sub("^prompt:", f"{where}:", str(error)))) from error
            asked += [replace(first, seed=choice_seed(seed, choice)) for choice in range(request.choices)]
        self.check_room(count)
        with _refusals():
            submissions = [self.worker.submit(one, deadline, bool(request.stop) or one.reveals) for one in asked]
        stops = request.stop
        texts = [CommittedText(self.llm.decode, stops) for _ in submissions]
        answers = [Answer(one, text, self._metrics) for one, text in zip(submissions, texts, strict=True)]
        return Answers(answers, request.choices)

    def check_room(self, count: int = 1) -> None:
        """Raise the `ApiError` that a request for so many answers would be refused with now, whatever it asks."""
        with _refusals():
            self.worker.check_room(count)

    async def _prompts(self, request: GenerationRequest) -> dict[str, list[int]]:
        """Token ids of every prompt, by where it stands in the request."""
        if isinstance(request, ChatRequest):
            return {request.asks: await self.texts.of_messages(request.messages)}
        assert isinstance(request, CompletionRequest)
        names = [request.asks] if request.prompts == 1 else [f"{request.asks}.{i}" for i in range(request.prompts)]
        prompts: dict[str, list[int]] = {}
        for name, prompt in zip(names, request.prompt, strict=True):
            prompts[name] = await self.texts.of_text(prompt) if isinstance(prompt, str) else prompt
        return prompts

    def _engine_request(
        self, request: GenerationRequest, where: str, prompt_ids: list[int], decoder: Decoder | None, seed: int
    ) -> Request:
        return Request(
            prompt_ids,
            max_tokens=self._max_tokens(request, where, len(prompt_ids)),
            temperature=request.temperature or 0.0,
            seed=seed,
            decoder=decoder,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=request.top_k or 0,
            stop_token_ids=request.stop_token_ids or (),
            ignore_eos=bool(request.ignore_eos),
            reveals=request.wants_events or request.alternatives is not None,
            top_logprobs=request.alternatives or 0,
        )

    def revealed(self, reveal: Reveal) -> Revealed:
        """A forward's reveals as a client reads them: a text for each token, special tokens by their names."""
        return Revealed(
            forward=reveal.forward,
            positions=reveal.positions,
            text=[self.texts.token(token) for token in reveal.token_ids],
            entropy=[round(entropy, 4) for entropy in reveal.entropies],
            size=reveal.size,
            block_size=reveal.block_size,
            opened=reveal.opened,
            frozen=reveal.frozen,
        )

    def check_model(self, name: str) -> None:
        """Raise 404 unless `name` is the served model's, or an adapter's."""
        if name not in self.settings.ids:
            raise model_not_found(name, self.settings.ids)

    def _adapter(self, name: str) -> str | None:
        """The adapter that decodes what is asked of a model: an adapter's own, and the base's as `user_config` says."""
        return name if name in self.settings.adapters else self.adapter

    def _check_answer_length(self, request: GenerationRequest) -> None:
        (name, wanted), limit = request.answer_length, self.settings.max_tokens_limit
        if wanted is not None and wanted > limit:
            raise ApiError(400, f"{name}: got {wanted}; accepted: 1 to {limit}", param=name, code="invalid_value")

    def _check_count(self, request: GenerationRequest) -> None:
        """Refuse what no replica has room for, however long it waits."""
        count, room = request.prompts * request.choices, self.settings.room
        if count > room:
            name = "n" if request.choices > 1 else request.asks
            message = f"{name}: {request.prompts} prompts with {request.choices} answers each are {count} at a time; "
            raise ApiError(400, f"{message}accepted: at most {room}", param=name, code="invalid_value")

    def _decoder(self, request: GenerationRequest) -> Decoder | None:
        wanted, limit = request.answer_length[1] or self.settings.max_tokens, self.settings.max_tokens_limit
        asked = request.diffusion
        if asked is None or (asked.decoder is None and not asked.overrides):
            return None if self.decoder is self.llm.engine.decoder else self.decoder
        accepted = self.decoders
        chosen = self.decoder if asked.decoder is None else accepted.get(asked.decoder)
        try:
            if chosen is None:
                raise unknown("decoder", asked.decoder, accepted)
            check_overrides(asked.overrides, chosen, self.llm.family, wanted, limit)
            return chosen.override(**asked.overrides)
        except InputError as error:
            raise bad_input(error, "diffusion.") from error

    def _max_tokens(self, request: GenerationRequest, where: str, prompt_tokens: int) -> int:
        """The answer length asked for, or as much of the default as the context has room for."""
        context = self.llm.engine.context
        wanted = request.answer_length[1]
        if prompt_tokens + (wanted or 1) <= context:
            return wanted or min(self.settings.max_tokens, context - prompt_tokens)
        message = (
            f"{where}: the prompt's {prompt_tokens} tokens and max_tokens {wanted or 1} exceed the model's context; "
            f"accepted: together at most {context} tokens"
        )
        raise ApiError(400, message, param=where, code="context_length_exceeded")
