"""Paths as users write them: `~` and environment variables mean the same in every setting, file and call."""

from __future__ import annotations

import os
import re

from d3llm_ray.errors import InputError

VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def expanded(path: str | os.PathLike[str], field: str = "path") -> str:
    """`path` with `~`, `$NAME` and `${NAME}` replaced, a URL as it is. `InputError` for a variable that is not set."""
    text = os.fspath(path)
    if "://" in text:
        return text
    for match in VARIABLE.finditer(text):
        name = match[1] or match[2]
        if name not in os.environ:
            raise InputError(f"{field}: got {text!r}: the environment variable {name} is not set")
    return os.path.expanduser(os.path.expandvars(text))
