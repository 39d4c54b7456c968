"""Errors as OpenAI writes them, with the right status.

Knows how exceptions become answers; nothing of what raised them.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException as AnyHTTPException

from multiexit_engine.errors import EngineClosed, QueueFull, RequestFailed
from multiexit_engine.runtime.rows.chosen_rows import NO_TOKEN_IN_FORM, NO_TOKEN_LEFT
from multiexit_engine.serve.protocol import BODIES, UNSUPPORTED, Body

# What a refused client should wait: a step takes far less, a whole text rarely much more.
RETRY_AFTER_S = "1"
CLIENT_HAS_GONE = 499
MAX_REASONS = 4
MAX_MESSAGE_CHARS = 1000


class ErrorBody(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorBody


class ApiError(HTTPException):
    """An answer with an error status; FastAPI lets it through wherever it is raised.

    Args:
        status: HTTP status.
        message: what was given, what is allowed, what to do.
        param: the field at fault, if it is one.
        code: short name of the error, if it has one.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = _printable(message)
        self.param = None if param is None else _printable(param)
        self.code = code


class ClientHasGone(Exception):
    """The client closed the connection before its answer was ready.

    No handler answers it, since a stream has begun and nobody listens: the log takes note.
    """


def error_json(error: ApiError) -> dict[str, Any]:
    """The JSON form of an error."""
    body = ErrorBody(
        message=error.message, type=_type(error.status), param=error.param, code=error.code
    )
    return ErrorResponse(error=body).model_dump()


def error_response(error: ApiError) -> JSONResponse:
    """The whole answer of an error."""
    headers = {}
    if error.status in (429, 503):
        headers["Retry-After"] = RETRY_AFTER_S
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_json(error), error.status, headers)


def as_api_error(error: Exception) -> ApiError:
    """The answer to what the engine raised; an unknown error tells the client nothing."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(429, str(error), code="too_many_requests")
        case EngineClosed():
            return ApiError(503, str(error), code="shutting_down")
        case RequestFailed() if str(error) in (NO_TOKEN_LEFT, NO_TOKEN_IN_FORM):
            return ApiError(400, str(error), code="no_token_left")
        case RequestFailed():
            return ApiError(500, str(error), code="request_failed")
        case ValueError():
            return ApiError(400, str(error))
        case _:
            return ApiError(500, "the server failed; its log says why", code="internal_error")


def install_handlers(app: FastAPI) -> None:
    """Answer every error of an application in the one form."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(_of_validation(error, BODIES.get(request.url.path)))

    @app.exception_handler(AnyHTTPException)
    async def http(request: Request, error: AnyHTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = error_response(ApiError(error.status_code, message))
        response.headers.update(error.headers or {})
        return response


def _printable(text: str) -> str:
    """Something that UTF-8 can hold, and not longer than anybody reads."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_MESSAGE_CHARS else text[:MAX_MESSAGE_CHARS] + "..."


def _type(status: int) -> str:
    names = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable"}
    return names.get(status, "server_error" if status >= 500 else "invalid_request_error")


def _of_validation(error: RequestValidationError, body: type[Body] | None) -> ApiError:
    """One sentence about the first field that is wrong."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    place = [str(part) for part in first["loc"] if part != "body"]
    if not place:
        wanted = "a JSON object, sent with the header Content-Type: application/json"
        return ApiError(400, f"the body must be {wanted}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, _unknown_field(place, body), param=".".join(place))
    same = [e["msg"] for e in error.errors() if e["loc"][1:2] == first["loc"][1:2]]
    reasons = list(dict.fromkeys(same))[:MAX_REASONS]
    return ApiError(400, f"{place[0]}: " + ", or ".join(reasons), param=place[0])


def _unknown_field(place: list[str], body: type[Body] | None) -> str:
    name = ".".join(place)
    if name in UNSUPPORTED:
        return f"{name}: {UNSUPPORTED[name]}"
    if len(place) > 1 or body is None:
        return f"{name}: unknown field; take it away"
    return f"{name}: unknown field; known are {', '.join(body.model_fields)}"
