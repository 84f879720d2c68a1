"""Framing of server-sent events (WHATWG HTML, section 9.2) as OpenAI's clients read them."""

from __future__ import annotations

import json
from typing import Any

from d3llm_ray.serving.replies import ChatChunk

DONE = "data: [DONE]\n\n"


def sse(body: ChatChunk | dict[str, Any], *, show_usage: bool = False) -> str:
    """One event. A chunk's `usage` is left out, not null, unless the client asked for it; so are unset deltas."""
    if isinstance(body, dict):
        return f"data: {json.dumps(body)}\n\n"
    values = body.model_dump(mode="json")
    for choice in values["choices"]:
        choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
    if not show_usage:
        del values["usage"]
    if values["diffusion"] is None:
        del values["diffusion"]
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"
