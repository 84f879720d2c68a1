"""Framing of server-sent events (WHATWG HTML, section 9.2) as OpenAI's clients read them."""

from __future__ import annotations

import json
from typing import Any

from d3llm_ray.serving.replies import ChatChunk, TextChunk

DONE = "data: [DONE]\n\n"


def sse(body: ChatChunk | TextChunk | dict[str, Any], *, show_usage: bool = False) -> str:
    """One event. A chunk's `usage` is left out, not null, unless the client asked for it; so is what is unset."""
    if isinstance(body, dict):
        return f"data: {json.dumps(body)}\n\n"
    values = body.model_dump(mode="json")
    for choice in values["choices"]:
        if "delta" in choice:
            choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
        elif choice["token_ids"] is None:
            del choice["token_ids"]
    if not show_usage:
        del values["usage"]
    if values["diffusion"] is None:
        del values["diffusion"]
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"
