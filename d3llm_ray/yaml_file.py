"""Reading a YAML file, for the core as well as for settings: no pydantic here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from d3llm_ray.errors import InputError


def read_yaml(path: str | Path, field: str = "config") -> dict[str, Any]:
    """Read a YAML mapping, or raise `InputError` naming `field`, the file and what is wrong with it."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(
            f"{field}: cannot read {str(path)!r}: {error.strerror}; accepted: a readable YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{field}: {str(path)!r} is not YAML: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{field}: {str(path)!r} holds {type(content).__name__}; accepted: a mapping of settings")
    return content
