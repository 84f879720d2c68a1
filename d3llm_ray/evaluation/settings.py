"""Settings of the verb `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from d3llm_ray.clients.settings import RequestOptions
from d3llm_ray.config import DecoderSettings, SettingsGroup, TaskOptions

Value = bool | int | float | str | None


class Pair(SettingsGroup):
    """One line of the table: a model with a decoder, and the names to show for them."""

    model: str = Field(description="zoo name or checkpoint folder")
    decoder: str = Field(description="preset or decoding settings file (.yaml)")
    decoder_settings: DecoderSettings = Field(default={}, description="settings that override the decoder's")
    model_label: str | None = Field(
        default=None, description="name in the report; default: the zoo name or the folder's name"
    )
    decoder_label: str | None = Field(
        default=None, description="name in the report; default: preset, with the file's name if any"
    )


class ActorOptions(TaskOptions):
    """What every verb that decodes on engine actors is told of them."""

    actors: int = Field(0, ge=0, description="engine actors on Ray that share the problems; 0: this process, no Ray")
    cpus_per_actor: int = Field(1, ge=0, description="CPUs, and threads, of each engine actor")
    gpus_per_actor: float = Field(0.0, ge=0.0, description="GPUs of each engine actor")
    resource_timeout_s: float = Field(300.0, gt=0, description="seconds to wait for the actors to load the model")


class MeasureOptions(ActorOptions):
    """What every verb is told that measures by the machinery of `evaluate`."""

    warmup: int = Field(1, ge=0, description="problems decoded once before the clock of each measurement starts")
    shard_size: int = Field(
        128, gt=0, description="problems that an actor decodes at a time, which an interrupted run decodes again"
    )


class EvaluateSettings(RequestOptions, MeasureOptions):
    """Measure accuracy, tokens per forward, tokens per second and AUP of models with decoders on tasks."""

    verb: ClassVar[str] = "evaluate"
    recipes: ClassVar[Path | None] = Path(__file__).with_name("presets")

    models: list[str] = Field(["tiny-llada"], min_length=1, description="zoo names or checkpoint folders")
    decoders: list[str] = Field(
        ["vanilla", "d3llm"],
        min_length=1,
        description="presets or decoding settings files (.yaml), each with every model",
    )
    decoder_settings: DecoderSettings = Field({}, description="override those of every decoder that has them")
    pairs: list[Pair] = Field([], description="measure these (model, decoder) pairs instead of models x decoders")
    sweep: dict[str, list[Value]] = Field(
        {}, description="decoder settings and the values to measure each at, for decoders that have them all"
    )
    tasks: list[str] = Field(["arith"], min_length=1, description="embedded or published tasks, or task files")
    split: Literal["test", "validation"] = Field("test", description="which problems")
    count: int = Field(500, gt=0, description="problems per task")
    anchors: dict[str, str] = Field(
        {}, description="model label -> label of the model whose vanilla run anchors its AUP; default: its own"
    )
    url: str | None = Field(
        None,
        description="server of ours to ask, such as http://127.0.0.1:8000, of which `models` are then the ids; null: "
        "the models are loaded",
    )
    concurrency: int = Field(32, gt=0, description="requests to `url` that are under way at once")
    output: Path = Field(Path("runs/evaluate"), description="folder of the report")

    def all_pairs(self) -> list[Pair]:
        """The pairs to measure."""
        return self.pairs or [Pair(model=model, decoder=name) for model in self.models for name in self.decoders]
