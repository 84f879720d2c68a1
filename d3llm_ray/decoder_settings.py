"""Decoders as users name them: a preset, or a decoding settings file (YAML) that names one and overrides it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d3llm_ray.config import read_yaml
from d3llm_ray.decoding import Decoder, decoder
from d3llm_ray.errors import InputError, require


def read_decoder(name_or_file: str) -> Decoder:
    """The decoder of a preset's name or of a decoding settings file (.yaml). `InputError` as of these."""
    return read_settings_file(name_or_file) if is_settings_file(name_or_file) else decoder(name_or_file)


def read_settings_file(path: str | Path) -> Decoder:
    """The decoder of a decoding settings file: `decoder` names its preset, the rest overrides it.

    Raises:
        InputError: an unreadable file, an unknown preset or setting, or a value that is not accepted.
    """
    values = read_yaml(path)
    preset = values.pop("decoder", None)
    require(isinstance(preset, str), f"{path}: decoder", preset, "the name of a preset")
    try:
        return decoder(str(preset), **values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def decoding_settings(chosen: Decoder) -> dict[str, Any]:
    """The content of a decoding settings file: the preset's name under `decoder`, and every setting."""
    return {"decoder": chosen.name, **chosen.settings()}


def is_settings_file(name_or_file: str) -> bool:
    """Whether a decoder is given as a file rather than by its preset's name."""
    return Path(name_or_file).suffix in (".yaml", ".yml")
