"""Decoders by name: schedule x selection x caching."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from d3llm_ray.decoding.caches import BlockCache, CausalCache, DelayedCache, NoCache, PipelineCache, SubBlockCache
from d3llm_ray.decoding.contracts import Caching, Part, Schedule, Selection
from d3llm_ray.decoding.remasking import DREAM_RULES, TopK
from d3llm_ray.decoding.rules import family_rules
from d3llm_ray.decoding.schedules import GrowingMultiBlock, MultiBlock, NextToken, SequentialBlocks, SubBlocks
from d3llm_ray.decoding.selections import (
    AllEligible,
    BlockwiseConfidence,
    ConfidenceThreshold,
    EntropyThreshold,
    Scripted,
    SubBlockConfidence,
)
from d3llm_ray.errors import InputError, require, unknown
from d3llm_ray.models import Family

PartOf = TypeVar("PartOf", bound=Part)
Needs = Literal["a masked-diffusion model with full attention", "a masked model with shifted logits", "a causal model"]
_FULL: Needs = "a masked-diffusion model with full attention"
_SHIFTED: Needs = "a masked model with shifted logits"
_CAUSAL: Needs = "a causal model"


@dataclass(frozen=True)
class Decoder:
    """How a request is decoded. `block_size` None takes the model's own."""

    name: str
    schedule: Schedule
    selection: Selection
    caching: Caching
    block_size: int | None = None
    early_stop: bool = False
    needs: Needs = _FULL

    def __post_init__(self) -> None:
        size = self.block_size
        positive = size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0)
        require(positive, "block_size", size, "a positive number of tokens, or null for the model's own")
        require(isinstance(self.early_stop, bool), "early_stop", self.early_stop, "true or false")
        sub, fixed = getattr(self.schedule, "sub_block_size", 1), self.schedule.fixed_block_size
        require(size is None or size % sub == 0, "block_size", size, f"a multiple of sub_block_size {sub}")
        require(fixed in (None, size), "block_size", size, str(fixed))

    def settings(self) -> dict[str, Any]:
        """Every setting that may be overridden, with its value."""
        values: dict[str, Any] = {}
        if self.schedule.fixed_block_size is None:
            values = {"block_size": self.block_size, "early_stop": self.early_stop}
        for part in (self.schedule, self.selection, self.caching):
            values.update((field.name, getattr(part, field.name)) for field in fields(part))
        return values

    def override(self, **settings: Any) -> Decoder:
        """A copy with other settings; `InputError` for one that this decoder does not have or accept."""
        accepted = self.settings()
        for name, value in settings.items():
            if name not in accepted:
                raise InputError(
                    f"{name}: no setting of decoder {self.name!r}; accepted: {', '.join(sorted(accepted)) or 'none'}"
                )
            _check_number(name, value, accepted[name])
        whole = {name: settings[name] for name in ("block_size", "early_stop") if name in settings}
        return replace(
            self,
            schedule=_with(self.schedule, settings),
            selection=_with(self.selection, settings),
            caching=_with(self.caching, settings),
            **whole,
        )

    def scripted(self, tokens_per_forward: float) -> Decoder:
        """A copy that reveals a fixed mean number of tokens a forward, whatever the model says: for benchmarks."""
        return replace(self, selection=Scripted(tokens_per_forward))

    def check(self, family: Family) -> None:
        """Raise `InputError` with the reason when checkpoints of `family` cannot be decoded this way."""
        attention, masked = family.layout.attention, family.mask_token_id is not None
        fits = {
            _FULL: masked and attention == "full",
            _SHIFTED: masked and family.logit_shift,
            _CAUSAL: attention == "causal",
        }[self.needs]
        if fits:
            return
        traits = "causal and has no mask token" if not masked else f"trained with {attention} attention"
        if masked and not family.logit_shift:
            traits += " and unshifted logits, so that no row predicts a block's boundary token"
        raise InputError(
            f"decoder: {self.name!r} cannot decode a {family.name!r} model: it is {traits}; accepted: {self.needs}"
        )

    def block_length(self, family: Family, canvas: int) -> int:
        """Positions a block for a canvas of `canvas` positions: Dream's plain samplers know one block only."""
        if self.schedule.fixed_block_size is not None:
            return self.schedule.fixed_block_size
        whole = isinstance(self.selection, TopK) and self.selection.rule(family_rules(family)) in DREAM_RULES
        return self.block_size or (canvas if whole else family.block_size)


def _with(part: PartOf, settings: dict[str, Any]) -> PartOf:
    """A copy of one part of a decoder with those settings that are its own."""
    return replace(part, **{field.name: settings[field.name] for field in fields(part) if field.name in settings})


def _check_number(name: str, value: Any, default: Any) -> None:
    """Thresholds and counts come from YAML and HTTP: refuse text and NaN before they are compared."""
    if isinstance(default, float):
        number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
        require(number, name, value, "a number")


# Published defaults: LLaDA's generate.py, Fast-dLLM's, dParallel's, D2F's and d3LLM's evaluation scripts. Early stop is
# d3LLM's; the older decoders fill what they have begun, which is how their forwards are counted in the literature.
PRESETS: dict[str, Decoder] = {
    decoder.name: decoder
    for decoder in (
        Decoder("vanilla", SequentialBlocks(), TopK(), NoCache()),
        Decoder("fast-dllm-prefix", SequentialBlocks(), ConfidenceThreshold(), BlockCache("prefix")),
        Decoder("fast-dllm-dual", SequentialBlocks(), ConfidenceThreshold(), BlockCache("dual")),
        Decoder("dparallel", SequentialBlocks(), EntropyThreshold(), BlockCache()),
        Decoder("d2f", GrowingMultiBlock(), BlockwiseConfidence(), PipelineCache()),
        Decoder("fast-dllm-v2", SubBlocks(), SubBlockConfidence(), SubBlockCache(), needs=_SHIFTED),
        Decoder("d3llm-nocache", MultiBlock(), EntropyThreshold(), NoCache(), early_stop=True),
        Decoder("d3llm", MultiBlock(), EntropyThreshold(), DelayedCache(), early_stop=True),
        Decoder("autoregressive", NextToken(), AllEligible(), CausalCache(), block_size=1, needs=_CAUSAL),
    )
}


def default_decoder(family: Family) -> str:
    """The preset for a model of `family` where nobody names one."""
    return {"full": "d3llm", "block-causal": "fast-dllm-v2", "causal": "autoregressive"}[family.layout.attention]


def plain_decoder(family: Family) -> Decoder:
    """One token a forward, as the family's models are decoded without any acceleration: what speed is compared with."""
    if family.layout.attention == "block-causal":
        return decoder("fast-dllm-v2", confidence_threshold=1.0)
    return decoder("autoregressive" if family.layout.attention == "causal" else "vanilla")


def decoder(name: str, /, **overrides: Any) -> Decoder:
    """The preset `name` with `overrides`; `InputError` names the accepted decoders or settings."""
    if name not in PRESETS:
        raise unknown("decoder", name, PRESETS)
    return PRESETS[name].override(**overrides)
