"""What a run will do, worked out and checked before Ray starts or a weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from d3llm_ray.decoding import Decoder, decoder, decoding_settings, read_decoder, written_settings
from d3llm_ray.decoding.presets import plain_decoder
from d3llm_ray.decoding.rules import family_rules
from d3llm_ray.errors import require
from d3llm_ray.models import ZOO_NAMES, Family, read_configs, resolve_model
from d3llm_ray.trajectories.prompts import Prompt, distinct_prompts
from d3llm_ray.trajectories.schema import file_metadata
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.shards import STAGING
from d3llm_ray.trajectories.sources import Source, open_source
from d3llm_ray.trajectories.storage import Location


@dataclass(frozen=True)
class TrajectoryPlan:
    """A checked run. `staging` holds what is half done: prompts and committed parts."""

    settings: TrajectorySettings
    source: Source
    generation: Mapping[str, Any]  # all that a row depends on besides its prompt and reference
    metadata: Mapping[str, Any]  # of the files
    output: Location

    @property
    def staging(self) -> Location:
        return self.output / STAGING

    @property
    def staged_prompts(self) -> Location:
        return self.staging / "prompts"

    @property
    def parts(self) -> Location:
        return self.staging / "parts"

    @property
    def actor_settings(self) -> TrajectorySettings:
        """The settings with a teacher that an actor finds from its own working directory."""
        name = self.settings.teacher
        return self.settings.model_copy(
            update={"teacher": name if name in ZOO_NAMES else str(resolve_model(name).resolve())}
        )

    def prompts(self) -> Iterator[Prompt]:
        """Every distinct prompt in the source's order, read anew at each call."""
        return distinct_prompts(self.source.problems(), self.generation)


def make_plan(settings: TrajectorySettings) -> TrajectoryPlan:
    """Open the prompts and read the teacher's configuration. `InputError` for what could not be decoded at all."""
    config, family = read_configs(settings.teacher)
    chosen = teacher_decoder(settings, family)
    block_size = chosen.block_length(family, settings.max_tokens)
    whole_blocks = f"a multiple of the block size {block_size}"
    require(settings.max_tokens % block_size == 0, "max_tokens", settings.max_tokens, whole_blocks)
    context = config.max_position_embeddings
    shorter = f"less than the teacher's context {context}"
    require(settings.max_tokens < context, "max_tokens", settings.max_tokens, shorter)
    source = open_source(settings.prompts, settings.texts, settings.split, settings.count)
    generation = generation_settings(settings, chosen, block_size)
    metadata = file_metadata(family.name, generation)
    return TrajectoryPlan(settings, source, generation, metadata, Location.of(settings.output, "output"))


def teacher_decoder(settings: TrajectorySettings, family: Family) -> Decoder:
    """The decoder of `settings.decoder`, by default the finest order of reveals that the family has.

    That is one token a forward, block by block: the most probable one of LLaDA, that of lowest entropy of Dream
    (d3LLM's data preparation). As there, the whole canvas is decoded, also what follows a stop token, unless settings
    or file say `early_stop: true`. Raises `InputError` for one that does not fit the family or lacks a setting.
    """
    chosen = read_decoder(settings.decoder) if settings.decoder is not None else _finest(family)
    chosen.check(family)
    said = settings.decoder is not None and "early_stop" in written_settings(settings.decoder)
    default = {"early_stop": False} if "early_stop" in chosen.settings() and not said else {}
    return chosen.override(**(default | settings.decoder_settings))


def _finest(family: Family) -> Decoder:
    """One token a forward. Dream's own sampler would order the whole canvas at once; its blocks are taken in turn."""
    if family.layout.attention == "full" and family_rules(family).remasking == "entropy":
        return decoder("dparallel", entropy_threshold=0.0)
    return plain_decoder(family)


def generation_settings(settings: TrajectorySettings, chosen: Decoder, block_size: int) -> dict[str, Any]:
    """All that a row depends on besides its prompt and reference; part of every `prompt_id`.

    `block_size`: the one in effect. Machine settings (actors, batch size, device) change no row.
    """
    decoding = decoding_settings(chosen)
    if "block_size" in decoding:
        decoding["block_size"] = block_size
    return {
        "teacher": settings.teacher,
        "dtype": settings.dtype,
        "decoder": decoding,
        "max_tokens": settings.max_tokens,
        "temperatures": list(settings.ladder),
        "seed": settings.seed,
    }
