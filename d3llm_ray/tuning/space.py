"""The search space: which decoder, which of its settings are searched and where, which are overridden."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from d3llm_ray.config import DecoderSettings, Settings, SettingsGroup, build, read_yaml
from d3llm_ray.decoding import Decoder, read_decoder, written_settings
from d3llm_ray.errors import InputError, require

Value = bool | int | float | str | None
_MOST_PROBES = 256  # of one integer range
_OTHER_RULES = ("low_confidence", "random")  # LLaDA's, which know neither of Dream's settings

# Settings without effect: name -> the setting that replaces it, and with which of its values it does.
_REPLACED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "confidence_threshold": ("factor", lambda factor: factor is not None),
    "repeat_finished": ("cache", lambda cache: cache == "none"),
    "alg_temp": ("remasking", lambda rule: rule in _OTHER_RULES),
    "eps": ("remasking", lambda rule: rule in _OTHER_RULES),
}


class Range(SettingsGroup):
    """Numbers from `low` to `high`, both included; `log_float` is searched on a logarithmic scale."""

    type: Literal["float", "log_float", "int"]
    low: float
    high: float

    def probes(self) -> list[Value]:
        """Values that stand for all others when the space is checked."""
        if self.type != "int":
            return [self.low, self.high]
        stride = math.ceil((self.high - self.low + 1) / _MOST_PROBES)  # 1: every one of them
        return [*range(int(self.low), int(self.high), stride), int(self.high)]

    def contains(self, value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and (self.type != "int" or value == int(value))

    def check(self, field: str) -> None:
        """Raise `InputError` for bounds that make no range."""
        finite = math.isfinite(self.low) and math.isfinite(self.high)
        require(finite and self.low < self.high, f"{field}.low", self.low, f"a number below high ({self.high:g})")
        if self.type == "log_float":
            require(self.low > 0, f"{field}.low", self.low, "a number above 0 on a logarithmic scale")
        if self.type == "int":
            whole = self.low == int(self.low) and self.high == int(self.high)
            require(whole, field, (self.low, self.high), "whole bounds for type int")


class ValueChoice(SettingsGroup):
    """One of `values`."""

    type: Literal["choice"]
    values: tuple[Value, ...]

    def probes(self) -> list[Value]:
        return list(self.values)

    def contains(self, value: Any) -> bool:
        return any(value == candidate and type(value) is type(candidate) for candidate in self.values)

    def check(self, field: str) -> None:
        """Raise `InputError` for an empty choice, or a value twice."""
        require(bool(self.values), f"{field}.values", list(self.values), "at least one value")
        known = {(type(value), value) for value in self.values}
        require(len(known) == len(self.values), f"{field}.values", list(self.values), "every value once")


class SearchSpace(Settings):
    """A file of `tune_spaces/`."""

    renamed: ClassVar[dict[str, str]] = {"fixed": "decoder_settings"}

    decoder: str = Field(description="preset or decoding settings file (.yaml) whose settings are searched")
    parameters: dict[str, Annotated[Range | ValueChoice, Field(discriminator="type")]] = Field(
        min_length=1, description="setting -> where to search it"
    )
    decoder_settings: DecoderSettings = Field(
        {}, description="settings that override the decoder's, but are not searched"
    )
    start: tuple[dict[str, Value], ...] = Field(
        (), description="points that are tried first, after the decoder's own; what one leaves out is the decoder's own"
    )

    def base(self) -> Decoder:
        """The decoder before anything is searched. `InputError` as of `read_decoder`."""
        return read_decoder(self.decoder, **self.decoder_settings)

    def check(self) -> None:
        """Build the decoder at every bound and choice, alone and in pairs, so that no trial meets what is refused.

        Raises:
            InputError: an unknown preset or setting, a value or a pair of values that is not accepted, a parameter that
                has no effect, one of `decoder_settings` that is searched as well, or a `start` outside the space.
        """
        base = self.base()
        for name, parameter in self.parameters.items():
            searched_only = name not in self.decoder_settings
            require(searched_only, f"parameters.{name}", parameter.type, "settings that are not in decoder_settings")
            parameter.check(f"parameters.{name}")
            for value in parameter.probes():
                base.override(**{name: value})
        for first, second in combinations(self.parameters, 2):
            for one, other in product(self.parameters[first].probes(), self.parameters[second].probes()):
                self._check_pair(base, {first: one, second: other})
        for name in self.parameters:
            self._check_effect(name, base.settings())
        for place, point in enumerate(self.start):
            for name, value in point.items():
                field = f"start.{place}.{name}"
                require(name in self.parameters, field, value, f"the parameters: {', '.join(self.parameters)}")
                require(self.parameters[name].contains(value), field, value, f"a value in parameters.{name}")

    def _check_pair(self, base: Decoder, values: dict[str, Any]) -> None:
        try:
            base.override(**values)
        except InputError as error:
            pair = ", ".join(f"{name} {value}" for name, value in values.items())
            raise InputError(f"parameters: {pair} do not go together: {error}") from error

    def _check_effect(self, name: str, settings: dict[str, Any]) -> None:
        if name not in _REPLACED:
            return
        by, replaces = _REPLACED[name]
        possible = self.parameters[by].probes() if by in self.parameters else [settings.get(by)]
        if by in settings and all(map(replaces, possible)):
            raise InputError(
                f"parameters.{name}: has no effect with {by} {', '.join(map(str, possible))}; accepted: a search of "
                f"{name} where {by} is null or another, or none of it"
            )

    def decoding_settings(self, values: dict[str, Any]) -> dict[str, Any]:
        """The content of a decoding settings file with these values of the parameters."""
        return {**written_settings(self.decoder), **self.decoder_settings, **values}

    def default_point(self) -> dict[str, Any] | None:
        """The decoder's own values of the parameters; None where one of them lies outside the space."""
        return self._inside(self.base().settings())

    def first_points(self, published: Iterable[dict[str, Any]], most: int) -> list[dict[str, Any]]:
        """What a search tries first, at most `most` points, each once: the decoder's own settings, those of `start`,
        and those of `published` that lie in the space. What a point does not say is the decoder's own."""
        own = self.base().settings()
        points: list[dict[str, Any]] = []
        for settings in ({}, *self.start, *published):
            point = self._inside(own | settings)
            if point is not None and point not in points:
                points.append(point)
        return points[:most]

    def _inside(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        point = {name: settings[name] for name in self.parameters}
        inside = all(parameter.contains(point[name]) for name, parameter in self.parameters.items())
        return point if inside else None


def read_space(path: Path) -> SearchSpace:
    """Read and check a search space file; every `InputError` names the file."""
    values = read_yaml(path, "space")
    try:
        space = build(SearchSpace, values)
        space.check()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return space
