"""Decoders by name: schedule x selection x caching."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from d3llm_ray.decoding.caches import Caching, DelayedCache, NoCache
from d3llm_ray.decoding.schedules import MultiBlock, Schedule, SequentialBlocks
from d3llm_ray.decoding.selections import EntropyThreshold, Selection, TopK
from d3llm_ray.errors import InputError, require, unknown

Part = TypeVar("Part", bound=Schedule | Selection | Caching)


@dataclass(frozen=True)
class Decoder:
    """How a request is decoded. `block_size` None takes the model's own."""

    name: str
    schedule: Schedule
    selection: Selection
    caching: Caching
    block_size: int | None = None
    early_stop: bool = True

    def __post_init__(self) -> None:
        positive = self.block_size is None or (isinstance(self.block_size, int) and self.block_size > 0)
        require(positive, "block_size", self.block_size, "a positive number of tokens, or null for the model's own")
        require(isinstance(self.early_stop, bool), "early_stop", self.early_stop, "true or false")

    def settings(self) -> dict[str, Any]:
        """Every setting that may be overridden, with its value."""
        values: dict[str, Any] = {"block_size": self.block_size, "early_stop": self.early_stop}
        for part in (self.schedule, self.selection, self.caching):
            values.update((field.name, getattr(part, field.name)) for field in fields(part))
        return values

    def override(self, **settings: Any) -> Decoder:
        """A copy with other settings; `InputError` for one that this decoder does not have or accept."""
        accepted = self.settings()
        for name, value in settings.items():
            if name not in accepted:
                raise InputError(
                    f"{name}: no setting of decoder {self.name!r}; accepted: {', '.join(sorted(accepted))}"
                )
            _check_number(name, value, accepted[name])
        own = {name: settings[name] for name in ("block_size", "early_stop") if name in settings}
        return replace(
            self,
            schedule=_with(self.schedule, settings),
            selection=_with(self.selection, settings),
            caching=_with(self.caching, settings),
            **own,
        )


def _with(part: Part, settings: dict[str, Any]) -> Part:
    """A copy of one part of a decoder with those settings that are its own."""
    return replace(part, **{field.name: settings[field.name] for field in fields(part) if field.name in settings})


def _check_number(name: str, value: Any, default: Any) -> None:
    """Thresholds and counts come from YAML and HTTP: refuse text and NaN before they are compared."""
    if isinstance(default, float):
        number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
        require(number, name, value, "a number")


# Published defaults: LLaDA's generate.py, dParallel's and d3LLM's evaluation scripts. Early stop is d3LLM's; the
# older decoders fill their whole canvas, which is how their forwards are counted in the literature.
PRESETS: dict[str, Decoder] = {
    decoder.name: decoder
    for decoder in (
        Decoder("vanilla", SequentialBlocks(), TopK(), NoCache(), early_stop=False),
        Decoder("dparallel", SequentialBlocks(), EntropyThreshold(), NoCache(), early_stop=False),
        Decoder("d3llm-nocache", MultiBlock(), EntropyThreshold(), NoCache()),
        Decoder("d3llm", MultiBlock(), EntropyThreshold(), DelayedCache()),
    )
}


def decoder(name: str, **overrides: Any) -> Decoder:
    """The preset `name` with `overrides`; `InputError` names the accepted decoders or settings."""
    if name not in PRESETS:
        raise unknown("decoder", name, PRESETS)
    return PRESETS[name].override(**overrides)
