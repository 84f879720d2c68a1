"""Decoders as users name them: a preset, or a decoding settings file (YAML) that names one and overrides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d3llm_ray.decoding.presets import Decoder, decoder, default_decoder
from d3llm_ray.errors import InputError, require, unknown
from d3llm_ray.models import Family
from d3llm_ray.yaml_file import read_yaml


def choose_decoder(chosen: str | Path | Decoder | None, family: Family, /, **settings: Any) -> Decoder:
    """The decoder that is meant by a preset's name, a settings file, or None: what suits `family` by default.

    `settings` override its own. `InputError` as of `read_decoder`.
    """
    if isinstance(chosen, Decoder):
        return chosen.override(**settings)
    return read_decoder(default_decoder(family) if chosen is None else chosen, **settings)


def read_decoder(name_or_file: str | Path, /, **settings: Any) -> Decoder:
    """The decoder of a preset's name or of a decoding settings file (.yaml), with `settings` on top.

    Raises:
        InputError: an unreadable file, an unknown preset or setting, or a value that is not accepted.
    """
    values = written_settings(name_or_file)
    preset = values.pop("decoder")
    try:
        written = decoder(preset, **values)
    except InputError as error:
        raise (InputError(f"{name_or_file}: {error}") if is_settings_file(name_or_file) else error) from error
    return written.override(**settings)


def written_settings(name_or_file: str | Path) -> dict[str, Any]:
    """What a decoding settings file says: its preset under `decoder`, and what overrides it. A name says no more."""
    if not is_settings_file(name_or_file):
        return {"decoder": str(name_or_file)}
    values = read_yaml(name_or_file, "decoder")
    preset = values.get("decoder")
    require(isinstance(preset, str), f"{name_or_file}: decoder", preset, "the name of a preset")
    return values


def override_known(decoders: Sequence[Decoder], settings: Mapping[str, Any]) -> list[Decoder]:
    """Every decoder with those of `settings` that it has. `InputError` for a setting that none of them has."""
    accepted = {name for chosen in decoders for name in chosen.settings()}
    for name in settings:
        if name not in accepted:
            raise unknown("decoder_settings", name, accepted)
    return [
        chosen.override(**{name: settings[name] for name in chosen.settings() if name in settings})
        for chosen in decoders
    ]


def decoding_settings(chosen: Decoder) -> dict[str, Any]:
    """The content of a decoding settings file: the preset's name under `decoder`, and every setting."""
    return {"decoder": chosen.name, **chosen.settings()}


def is_settings_file(name_or_file: str | Path) -> bool:
    """Whether a decoder is given as a file rather than by its preset's name."""
    return Path(name_or_file).suffix in (".yaml", ".yml")
