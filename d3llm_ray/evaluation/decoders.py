"""Decoders as a report names them: presets, decoding settings files, and sweeps over a setting."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from d3llm_ray.config import read_yaml
from d3llm_ray.decoding import Decoder, decoder
from d3llm_ray.errors import InputError, require


def read_decoder(name_or_file: str) -> Decoder:
    """The decoder of a preset's name or of a decoding settings file (`decoder`: its preset; the rest: overrides).

    Raises:
        InputError: an unreadable file, an unknown preset or setting, or a value that is not accepted.
    """
    if not is_settings_file(name_or_file):
        return decoder(name_or_file)
    values = read_yaml(name_or_file)
    preset = values.pop("decoder", None)
    require(isinstance(preset, str), f"{name_or_file}: decoder", preset, "the name of a preset")
    try:
        return decoder(str(preset), **values)
    except InputError as error:
        raise InputError(f"{name_or_file}: {error}") from error


def is_settings_file(name_or_file: str) -> bool:
    """Whether a decoder is given as a file rather than by its preset's name."""
    return Path(name_or_file).suffix in (".yaml", ".yml")


def sweep_decoder(base: Decoder, sweep: dict[str, list[Any]]) -> list[Decoder]:
    """`base` at every combination of the swept values; `base` alone where it lacks one of the swept settings."""
    if not sweep or not sweep.keys() <= base.settings().keys():
        return [base]
    return [base.override(**dict(zip(sweep, values, strict=True))) for values in product(*sweep.values())]


def decoder_label(name_or_file: str, preset: str) -> str:
    """The preset's name, with that of the settings file where there is one."""
    return f"{preset} ({Path(name_or_file).stem})" if is_settings_file(name_or_file) else preset
