"""Settings of a served model: what a replica is told, and what the `serve` verb adds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from d3llm_ray.config import DecoderSettings, Settings, build
from d3llm_ray.errors import InputError, require, unknown

if TYPE_CHECKING:
    from d3llm_ray.decoding import Decoder
    from d3llm_ray.models import Family


def _fits(preset: Decoder, family: Family) -> bool:
    try:
        preset.check(family)
    except InputError:
        return False
    return True


ORIGIN = r"^(\*|https?://[^/\s?#@*]+)$"  # as browsers spell it: no path, no slash at the end


class ModelSettings(Settings):
    """Settings of a model that answers requests, wherever its process is."""

    model: str = Field("tiny-llada", description="zoo name or checkpoint folder, readable on every node")
    served_model_name: str | None = Field(
        None, min_length=1, description="model id that clients send; default: the zoo name or the folder's name"
    )
    decoder: str | None = Field(
        None, description="preset or decoding settings file (.yaml); null: the one for the model's family"
    )
    decoder_settings: DecoderSettings = Field({}, description="settings that override the decoder's")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type of weights and activations")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    max_batch_size: int = Field(16, gt=0, description="requests decoded in one forward")
    max_tokens: int = Field(64, gt=0, description="answer length in tokens when a request names none")
    max_tokens_limit: int = Field(
        256, gt=0, validate_default=True, description="largest answer length that a request may ask for"
    )


class ReplicaSettings(ModelSettings):
    """Settings of one decoder replica: the `args:` of an application in `serve_configs/*.yaml`."""

    renamed: ClassVar[dict[str, str]] = {"decoder_config": "decoder"}

    cpus_per_actor: int = Field(1, ge=0, description="CPUs of each replica")
    gpus_per_actor: float | None = Field(None, ge=0.0, description="GPUs of each replica; null: one where it uses CUDA")
    max_queue: int = Field(64, ge=0, description="requests that may wait for a slot; beyond that a request gets 429")
    max_body_bytes: int = Field(1_000_000, gt=0, description="largest request body; beyond that a request gets 413")
    step_timeout_s: float = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds after which a forward that has not ended fails all requests; the replica is then replaced",
    )
    request_timeout_s: float | None = Field(
        300.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds that an answer may take, waiting included; then it ends with 408; null: no limit",
    )
    request_decoders: list[str] | None = Field(
        None, description="presets that a request may name besides the decoder; null: all that fit the model's family"
    )
    api_keys: Path | None = Field(
        None,
        description="file of API keys, one a line, that only its owner and group may read; null: those of "
        "D3LLM_RAY_API_KEYS in the replica's environment, and without any everybody is answered",
    )
    api_keys_required: bool = Field(False, description="whether a replica refuses to start without an API key")
    cors_origins: list[Annotated[str, Field(pattern=ORIGIN)]] = Field(
        [], description="origins, such as https://chat.example.com, whose pages may ask; '*' for all; none: CORS is off"
    )
    log_requests: bool = Field(True, description="log a line of JSON a request, without prompts, answers and keys")

    adapters: dict[str, str] = Field(
        {}, description="LoRA adapters over this model: the id that clients send for each, and its folder"
    )
    slow_reader_timeout_s: float = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds after which a connection is ended whose client has not taken what was sent before",
    )
    drain_timeout_s: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds that a replica which is to stop may take to finish the answers that it has begun",
    )

    @field_validator("max_tokens_limit")
    @classmethod
    def _limit_covers_default(cls, limit: int, info: ValidationInfo) -> int:
        default = info.data.get("max_tokens", limit)  # absent when it is itself invalid
        require(limit >= default, "max_tokens_limit", limit, f"at least max_tokens, {default}")
        return limit

    @property
    def model_id(self) -> str:
        """The name under which clients ask for the model."""
        return self.served_model_name or Path(self.model).name

    @property
    def ids(self) -> tuple[str, ...]:
        """All names that clients may ask for: the model's, then its adapters'."""
        return (self.model_id, *self.adapters)

    @property
    def room(self) -> int:
        """Requests that a replica takes on at most, decoding and waiting."""
        return self.max_batch_size + self.max_queue

    def replica(self) -> ReplicaSettings:
        """The part that each replica is told."""
        return ReplicaSettings(**{name: getattr(self, name) for name in ReplicaSettings.model_fields})

    def decoding(self) -> Decoder:
        """Build the decoder of `decoder` and `decoder_settings`; `InputError` names the setting at fault."""
        from d3llm_ray.decoding import choose_decoder  # torch is slow to import: --help should not wait
        from d3llm_ray.models import read_configs

        family = read_configs(self.model)[1]
        chosen = choose_decoder(self.decoder, family, **self.decoder_settings)
        chosen.check(family)
        return chosen

    def request_presets(self) -> dict[str, Decoder]:
        """The presets that a request may name; `InputError` for one that there is not, or that does not fit."""
        from d3llm_ray.decoding import PRESETS
        from d3llm_ray.models import read_configs

        family = read_configs(self.model)[1]
        fitting = {name: preset for name, preset in PRESETS.items() if _fits(preset, family)}
        if self.request_decoders is None:
            return fitting
        for name in self.request_decoders:
            if name not in fitting:
                raise unknown("request_decoders", name, fitting)
        return {name: fitting[name] for name in self.request_decoders}

    def checked(self) -> ReplicaSettings:
        """Refuse a bad model or decoder before any replica starts; local paths come back absolute.

        A replica's working directory is not that of the process that deploys it.
        """
        from d3llm_ray.decoding import is_settings_file
        from d3llm_ray.serving.adapters import check_adapters
        from d3llm_ray.serving.auth import KEYS_VARIABLE, KeyRing

        self.decoding()
        self.request_presets()
        require(self.model_id not in self.adapters, "adapters", self.model_id, "ids that differ from the model's own")
        check_adapters(self.model, self.adapters)
        paths: dict[str, Any] = {"adapters": {name: os.path.abspath(path) for name, path in self.adapters.items()}}
        # The replicas' environment may be another: where keys are meant, a server without any must not start.
        paths["api_keys_required"] = self.api_keys_required or bool(os.environ.get(KEYS_VARIABLE))
        if self.api_keys is not None:
            KeyRing(self.api_keys, "")
            paths["api_keys"] = self.api_keys.absolute()
        if os.path.isdir(self.model):
            paths["model"] = os.path.abspath(self.model)
        if self.decoder is not None and is_settings_file(self.decoder):
            paths["decoder"] = os.path.abspath(self.decoder)
        return self.model_copy(update=paths)


class ApplicationSettings(ReplicaSettings):
    """Settings of one application: one model, or several behind one URL."""

    models: list[dict[str, Any]] = Field(
        [],
        description="several models behind one URL: the settings of each, above those that stand beside this",
    )

    def each(self) -> list[ReplicaSettings]:
        """The settings of each model's replicas; `InputError` names the one at fault."""
        if not self.models:
            return [self.replica()]
        common = self.replica().model_dump(include=self.model_fields_set)
        for name in ("model", "served_model_name"):
            require(name not in common, name, common.get(name), "nothing beside models, which name their own")
        models = [
            build(ReplicaSettings, common | entry, f"models.{number}") for number, entry in enumerate(self.models)
        ]
        ids = [name for model in models for name in model.ids]
        for name in ids:
            require(ids.count(name) == 1, "models", name, "an id once (served_model_name, adapters)")
        return models


class ServeSettings(ApplicationSettings):
    """Serve a model, or several, over HTTP with the OpenAI chat API, until Ctrl-C."""

    verb: ClassVar[str] = "serve"

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    replicas: int = Field(1, gt=0, description="decoder replicas, each with its own copy of the model")
