"""What a report lists: decoders swept over a setting, and labels of decoders and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from d3llm_ray.decoding import Decoder, is_settings_file


def sweep_decoder(base: Decoder, sweep: dict[str, list[Any]]) -> list[Decoder]:
    """`base` at every combination of the swept values; `base` alone where it lacks one of the swept settings."""
    if not sweep or not sweep.keys() <= base.settings().keys():
        return [base]
    return [base.override(**dict(zip(sweep, values, strict=True))) for values in product(*sweep.values())]


def decoder_label(name_or_file: str, preset: str) -> str:
    """The preset's name, with that of the settings file where there is one."""
    return f"{preset} ({Path(name_or_file).stem})" if is_settings_file(name_or_file) else preset


def distinct(short: Sequence[str], whole: Sequence[str]) -> list[str]:
    """The short label of each, but the whole one of those that differ and share the short one: files of one name."""
    homes = {label: {name for name, other in zip(whole, short, strict=True) if other == label} for label in short}
    return [label if len(homes[label]) == 1 else name for label, name in zip(short, whole, strict=True)]
