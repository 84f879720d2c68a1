"""The search space: which decoder, which of its settings are searched and where, which are overridden."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from d3llm_ray.config import DecoderSettings, Settings, SettingsGroup, build, read_yaml
from d3llm_ray.decoding import Decoder, read_decoder, written_settings
from d3llm_ray.errors import InputError, require

Value = bool | int | float | str | None


class Range(SettingsGroup):
    """Numbers from `low` to `high`, both included; `log_float` is searched on a logarithmic scale."""

    type: Literal["float", "log_float", "int"]
    low: float
    high: float

    def probes(self) -> list[Value]:
        """Values that stand for all others when the space is checked."""
        return [int(self.low), int(self.high)] if self.type == "int" else [self.low, self.high]

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
        """Raise `InputError` for an empty choice."""
        require(bool(self.values), f"{field}.values", list(self.values), "at least one value")


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

    def base(self) -> Decoder:
        """The decoder before anything is searched. `InputError` as of `read_decoder`."""
        return read_decoder(self.decoder, **self.decoder_settings)

    def check(self) -> None:
        """Build the decoder at every bound and choice, so that no trial can meet a setting it does not accept.

        Raises:
            InputError: an unknown preset or setting, a value that is not accepted, or one of `decoder_settings` that is
                searched as well.
        """
        base = self.base()
        for name, parameter in self.parameters.items():
            searched_only = name not in self.decoder_settings
            require(searched_only, f"parameters.{name}", parameter.type, "settings that are not in decoder_settings")
            parameter.check(f"parameters.{name}")
            for value in parameter.probes():
                base.override(**{name: value})

    def decoding_settings(self, values: dict[str, Any]) -> dict[str, Any]:
        """The content of a decoding settings file with these values of the parameters."""
        return {**written_settings(self.decoder), **self.decoder_settings, **values}

    def default_point(self) -> dict[str, Any] | None:
        """The decoder's own values of the parameters; None where one of them lies outside the space."""
        settings = self.base().settings()
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
