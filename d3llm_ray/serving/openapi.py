"""The OpenAPI document: what FastAPI knows, and what only the served model knows: name, limits, decoders."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from d3llm_ray.decoding import Decoder
from d3llm_ray.errors import InputError
from d3llm_ray.serving.auth import KEYLESS_ROUTES
from d3llm_ray.serving.bounds import largest
from d3llm_ray.serving.fields import either
from d3llm_ray.serving.replies import ChatChunk, ErrorBody, TextChunk
from d3llm_ray.serving.schemas import MAX_SEED
from d3llm_ray.serving.service import ChatService

DESCRIPTION = (
    "OpenAI's API over a masked-diffusion language model. In a JSON body `null` is the same as leaving a field out, "
    "unknown fields are refused, and so is what would have to be ignored. Whole numbers are written without a fraction."
)
MEANINGS = {
    400: "The request is not accepted; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "No such model.",
    408: "The deadline of the request has passed.",
    413: "The body is too large.",
    431: "The headers are too large or too many.",
    429: "There is no room; ask again after `Retry-After` seconds.",
    500: "The engine failed, or the logits of the request were not finite.",
    503: "The engine has failed: this replica is being replaced.",
}
TINY = 1e-6
STREAM_EXAMPLE = 'data: {"id": "...", "choices": [...]}\n\ndata: [DONE]\n\n'
_STREAMED = {"stream": {"const": True}}
_UNSEEN = {"diffusion": {"anyOf": [{"type": "null"}, {"properties": {"events": {"enum": [False, None]}}}]}}
# What the fields of a body say about each other.
TOGETHER: dict[str, list[dict[str, Any]]] = {
    "ChatRequest": [
        either({"stream_options": {"type": "null"}}, _STREAMED),
        either(_UNSEEN, _STREAMED),
        either({"top_logprobs": {"enum": [0, None]}}, {"logprobs": {"const": True}}),
    ],
    "CompletionRequest": [
        either({"stream_options": {"type": "null"}}, _STREAMED),
        either(_UNSEEN, _STREAMED),
        {"anyOf": [{"properties": {"echo": {"enum": [False, None]}}}, {"properties": {"logprobs": {"type": "null"}}}]},
    ],
    "TokenizeRequest": [
        {
            "anyOf": [
                {"properties": {one: {"type": kind}, other: {"type": "null"}}, "required": [one]}
                for one, kind, other in (("prompt", "string", "messages"), ("messages", "array", "prompt"))
            ]
        }
    ],
}
EXAMPLES: dict[str, dict[str, Any]] = {
    "ChatRequest": {"messages": [{"role": "user", "content": "2 + 3 ="}], "max_tokens": 16},
    "CompletionRequest": {"prompt": "2 + 3 =", "max_tokens": 16},
    "TokenizeRequest": {"prompt": "2 + 3 ="},
    "DetokenizeRequest": {"tokens": [5, 6, 7]},
}
ALL_BODIES = (400, 404, 413)  # of every route that reads a body
DECODES = (*ALL_BODIES, 408, 429, 500, 503)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for error statuses, all of OpenAI's shape."""
    return {status: {"model": ErrorBody, "description": MEANINGS[status]} for status in (*statuses, 431)}


def or_stream(chunk: str) -> dict[int | str, dict[str, Any]]:
    """The answer of a route that decodes, also as events; `chunk` is the schema of an event's data."""
    text = f"The answer. With `stream`: events whose data are of the schema `{chunk}`, then `[DONE]`; "
    text += "after an error, which is an event too, there is no `[DONE]`."
    return {200: {"description": text, "content": {"text/event-stream": {"example": STREAM_EXAMPLE}}}}


def document(app: FastAPI, service: ChatService) -> dict[str, Any]:
    """The OpenAPI document of the served model, made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
        shape = {"schema": {"$ref": "#/components/schemas/ErrorBody"}}
        refused = {"description": MEANINGS[401], "content": {"application/json": shape}}
        for path, methods in made["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)  # every refused body is a 400 here
                if service.keys.asks and path not in KEYLESS_ROUTES:
                    operation["responses"]["401"] = refused
                    operation["security"] = [{"key": []}]
        if service.keys.asks:
            made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schemas = made["components"]["schemas"]
        for chunk in (ChatChunk, TextChunk):
            event = chunk.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
            schemas |= {**event.pop("$defs"), chunk.__name__: event}
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        _of_the_model(schemas, service)
        app.openapi_schema = made
    return app.openapi_schema


def _of_the_model(schemas: dict[str, Any], service: ChatService) -> None:
    """Put in what is accepted of this model alone."""
    name, limit = service.settings.model_id, service.settings.max_tokens_limit
    for body, example in EXAMPLES.items():
        fields = schemas[body]["properties"]
        schemas[body]["examples"] = [{"model": name, **example}]
        if body in TOGETHER:
            schemas[body]["allOf"] = TOGETHER[body]
        fields["model"] = {"type": "string", "enum": [name], "description": "the served model"}
        for field in ("max_tokens", "max_completion_tokens"):
            if field in fields:
                fields[field]["anyOf"][0]["maximum"] = limit
        if "seed" in fields:
            fields["seed"]["anyOf"][0]["maximum"] = MAX_SEED  # which FastAPI writes as a float
    token = {"type": "integer", "minimum": 0, "maximum": service.llm.model.config.vocab_size - 1}
    ids = {"type": "array", "items": token}
    completion = schemas["CompletionRequest"]["properties"]
    for body in (schemas["ChatRequest"]["properties"], completion):
        body["stop_token_ids"]["anyOf"][0]["items"] = token
    for kind in completion["prompt"]["anyOf"]:
        if kind.get("items", {}).get("type") == "integer":
            kind["items"] = token
        elif kind.get("items", {}).get("type") == "array":
            kind["items"]["items"] = token
    schemas["DetokenizeRequest"]["properties"]["tokens"] |= ids
    own = service.llm.engine.decoder.name
    variants = [_settings_of(preset, service, name == own) for name, preset in service.decoders.items()]
    schemas["Diffusion"] = {"anyOf": variants, "description": schemas["Diffusion"]["description"]}


def _settings_of(preset: Decoder, service: ChatService, own: bool) -> dict[str, Any]:
    """Schema of `diffusion` for one decoder; the server's own needs no name."""
    fields: dict[str, Any] = {
        "decoder": {"enum": [preset.name, *([None] if own else [])]},
        "events": {"type": ["boolean", "null"], "description": "only with `stream`: what every forward reveals"},
    }
    hints = get_type_hints(Decoder) | {
        name: hint
        for part in (preset.schedule, preset.selection, preset.caching)
        for name, hint in get_type_hints(type(part)).items()
    }
    for name, value in preset.settings().items():
        kinds = TypeAdapter(hints[name] | None).json_schema()
        for kind in kinds["anyOf"]:
            if kind.get("type") in ("integer", "number"):
                kind |= _range(name, preset, service)
        fields[name] = {**kinds, "description": f"default: {json.dumps(value)}"}
    return {
        "type": "object",
        "title": preset.name,
        "properties": fields,
        "additionalProperties": False,
        "required": [] if own else ["decoder"],
    }


def _range(name: str, preset: Decoder, service: ChatService) -> dict[str, float]:
    """The numbers that a request may set `name` to; what depends on other settings is left out."""
    bound = largest(name, preset, service.llm.family, service.settings.max_tokens, service.settings.max_tokens_limit)
    edges: list[tuple[str, float, float]] = [("minimum", 0, 0), ("exclusiveMinimum", 0, TINY), ("minimum", 1, 1)]
    low = next(edge for edge in edges if _accepts(preset, name, edge[2]))
    edges = [("maximum", bound, bound), ("maximum", 1, 1), ("exclusiveMaximum", 1, 1 - TINY)]
    high = next(edge for edge in edges if _accepts(preset, name, edge[2]))
    return {low[0]: low[1], high[0]: high[1]}


def _accepts(preset: Decoder, name: str, value: float) -> bool:
    try:
        preset.override(**{name: value})
    except InputError:
        return False
    return True
