"""Errors of the HTTP edge, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d3llm_ray.errors import InputError
from d3llm_ray.serving.access_log import note_error, request_id

logger = logging.getLogger("d3llm_ray.serving")
_TYPES = {
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}
RETRY_AFTER_S = 1
_SHOWN_INPUT = 80  # characters of a refused value that are echoed


class ApiError(Exception):
    """A refusal with its HTTP status; `param` names the field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return JSONResponse(self.body(), self.status, headers)


def queue_full() -> ApiError:
    """The refusal of a request that would have to wait for too long."""
    return ApiError(429, "the queue is full; ask again later", code="queue_full", retry_after_s=RETRY_AFTER_S)


def out_of_time(error: Exception) -> ApiError:
    """The end of a request whose deadline has passed."""
    return ApiError(408, str(error), code="request_timeout")


def bad_input(error: InputError, prefix: str = "") -> ApiError:
    """An `InputError` begins with the field's name; that name, below `prefix`, becomes `param`."""
    field, _, _ = str(error).partition(":")
    return ApiError(400, f"{prefix}{error}", param=f"{prefix}{field}", code="invalid_value")


def to_api_error(error: Exception) -> ApiError:
    """Map what a handler raised; anything unforeseen is logged here and not shown to the client."""
    mapped = _mapped(error)
    note_error(mapped.code or str(mapped.status))
    return mapped


def _mapped(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return bad_input(error)
    if isinstance(error, RequestValidationError):
        return _invalid_body(error.errors())
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    logger.error("request %s failed", request_id(), exc_info=error)
    return ApiError(500, "internal error; the server's log has the details", code="internal_error")


def _invalid_body(errors: Sequence[dict[str, Any]]) -> ApiError:
    first = errors[0]
    param = ".".join(str(part) for part in first["loc"][1:])
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: not JSON: {first['ctx']['error']} at character {param}", code="invalid_json")
    if first["type"] == "refusal":
        context = first["ctx"]
        return ApiError(400, f"{context['param']}: {first['msg']}", param=context["param"], code=context["code"])
    if not param:
        return ApiError(400, "body: accepted: a JSON object, sent as application/json", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: unknown field", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param}: required", param=param, code="missing_required_parameter")
    return ApiError(400, f"{param}: got {_shown(first['input'])}: {first['msg']}", param=param, code="invalid_value")


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= _SHOWN_INPUT else f"{text[:_SHOWN_INPUT]}..."


def install_handlers(app: FastAPI) -> None:
    """Answer every error of `app`, unknown routes included, in OpenAI's shape."""

    async def handle(_: Request, error: Exception) -> JSONResponse:
        response = to_api_error(error).response()
        response.headers.update(getattr(error, "headers", None) or {})  # such as `Allow` of a 405
        return response

    for kind in (ApiError, InputError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


class AnswersErrors:
    """ASGI middleware: what was raised before an answer began is answered in OpenAI's shape.

    That is what the guards within it raise, and what no handler foresaw. Starlette's own middleware for the latter
    stands before all others: its answers would lack an id, a log line and what CORS needs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = False

        async def noticing(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self._app(scope, receive, noticing)
        except Exception as error:
            if began or scope["type"] != "http":
                raise
            await to_api_error(error).response()(scope, receive, send)
