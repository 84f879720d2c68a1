"""The API key that a verb sends to a server: from a file or the environment, never from the command line."""

from __future__ import annotations

import os
from pathlib import Path

from d3llm_ray.errors import InputError, require
from d3llm_ray.paths import not_uploaded

KEY_VARIABLES = ("D3LLM_RAY_API_KEY", "OPENAI_API_KEY")


def client_key(file: Path | None) -> str | None:
    """The key of `api_key_file` or else of the environment; `InputError` for a file that does not hold one key."""
    if file is None:
        return next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
    accepted = f"a file that holds one key{not_uploaded(file)}"
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"api_key_file: cannot read {str(file)!r}: {reason}; accepted: {accepted}") from error
    require(bool(key) and key.isascii() and key.isprintable() and " " not in key, "api_key_file", str(file), accepted)
    return key
