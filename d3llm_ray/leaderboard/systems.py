"""Systems of a leaderboard: a model and a decoder with the settings to choose from, and what it is compared with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from d3llm_ray.config import DecoderSettings, Settings, SettingsGroup, build, read_yaml
from d3llm_ray.decoding import Decoder, decoding_settings, read_decoder
from d3llm_ray.decoding.presets import plain_decoder
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.settings import Pair, Value
from d3llm_ray.models import read_configs, resolve_model

SHIPPED = Path(__file__).with_name("systems.yaml")


class System(SettingsGroup):
    """One system: what is measured, and which settings it may choose its best from."""

    model: str = Field(description="zoo name or checkpoint folder")
    decoder: str = Field(description="preset or decoding settings file (.yaml)")
    decoder_settings: DecoderSettings = Field(default={}, description="settings that override the decoder's")
    grid: dict[str, Annotated[list[Value], Field(min_length=1)]] = Field(
        default={},
        description="decoder settings and their values: the best combination on validation problems is taken",
    )
    anchor: DecoderSettings = Field(
        default={},
        description="settings of the model's plain decoder, whose accuracy is the point at one token a forward",
    )
    note: str = Field(default="", description="a remark for the table")


class SystemsFile(Settings):
    """What a systems file holds."""

    verb: ClassVar[str] = "leaderboard"

    systems: dict[str, System] = Field(min_length=1, description="by name: a system")


@dataclass(frozen=True)
class SystemRun:
    """One thing to measure: a model with a decoder. Equal ones of two systems are measured once."""

    model: str
    decoder: Decoder

    @property
    def key(self) -> str:
        return json.dumps([str(resolve_model(self.model).resolve()), decoding_settings(self.decoder)], sort_keys=True)

    @property
    def pair(self) -> Pair:
        """As `evaluate` takes it."""
        settings = decoding_settings(self.decoder)
        return Pair(model=self.model, decoder=settings.pop("decoder"), decoder_settings=settings)


@dataclass(frozen=True)
class PlannedSystem:
    """A system with its decoders made: the plain one that anchors it, and the candidates, one at least."""

    name: str
    system: System
    anchor: SystemRun
    candidates: tuple[SystemRun, ...]

    def runs(self) -> Iterator[SystemRun]:
        yield self.anchor
        yield from self.candidates


def read_systems(path: Path | None) -> dict[str, System]:
    """The systems of a file, by name; of the shipped one without a path. `InputError` names the file and the field."""
    try:
        return build(SystemsFile, read_yaml(path or SHIPPED, "systems")).systems
    except InputError as error:
        raise (
            error
            if str(error).startswith("systems: ") and path is None
            else InputError(f"systems: {str(path or SHIPPED)!r}: {error}")
        ) from error


def plan_systems(systems: dict[str, System]) -> list[PlannedSystem]:
    """Make every decoder; `InputError` names the system whose model, decoder or setting is not one, or does not fit."""
    planned = []
    for name, system in systems.items():
        try:
            family = read_configs(system.model)[1]
            base = read_decoder(system.decoder).override(**system.decoder_settings)
            base.check(family)
            values = [dict(zip(system.grid, each, strict=True)) for each in product(*system.grid.values())]
            candidates = tuple(SystemRun(system.model, base.override(**each)) for each in values)
            anchor = SystemRun(system.model, plain_decoder(family).override(**system.anchor))
            anchor.decoder.check(family)
        except InputError as error:
            raise InputError(f"systems.{name}: {error}") from error
        planned.append(PlannedSystem(name, system, anchor, candidates))
    return planned


def distinct_runs(runs: Iterator[SystemRun]) -> dict[str, SystemRun]:
    """Every run once, by its key, in the order of the first time it comes."""
    found: dict[str, SystemRun] = {}
    for run in runs:
        found.setdefault(run.key, run)
    return found
