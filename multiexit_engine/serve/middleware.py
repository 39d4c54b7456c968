"""What stands before every handler: request ids and the log, body limit, API keys.

Plain ASGI, so that streams pass through as they are.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from multiexit_engine.serve.errors import (
    CLIENT_HAS_GONE,
    ApiError,
    ClientHasGone,
    as_api_error,
    error_response,
)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
OPEN_PATHS = frozenset({"/", "/health", "/version"})

logger = logging.getLogger("multiexit_engine.serve.access")


class RequestLog:
    """Gives every request an id, and writes one line about it when it has ended.

    The client's own ``x-request-id`` is taken if it is up to 128 letters, digits, dots, dashes and
    underscores. Nothing of the bodies is written.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        started, status = perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientHasGone:
            status = CLIENT_HAS_GONE
        except Exception as error:
            logger.exception("request failed", extra={"fields": {"request_id": request_id}})
            if not status:
                await error_response(as_api_error(error))(scope, receive, send_with_id)
        finally:
            line = _line(scope, request_id, status, perf_counter() - started)
            logger.info("request", extra={"fields": line})


def _line(scope: Scope, request_id: str, status: int, seconds: float) -> dict[str, Any]:
    line = {
        "request_id": request_id,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "duration_ms": round(seconds * 1e3, 1),
    }
    usage = scope["state"].get("usage")
    if usage is not None:
        line["prompt_tokens"] = usage.prompt_tokens
        line["completion_tokens"] = usage.completion_tokens
        line["cached_tokens"] = usage.cached_tokens
    return line


class BodyLimit:
    """Refuses bodies longer than ``max_bytes`` with status 413, before they are read whole."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdigit() or int(length) > self._max_bytes:
            await error_response(self._too_long())(scope, receive, send)
            return
        num_bytes = 0

        async def receive_some() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._too_long()
            return message

        await self._app(scope, receive_some, send)

    def _too_long(self) -> ApiError:
        return ApiError(
            413, f"the body is longer than {self._max_bytes} bytes", code="body_too_long"
        )


class ApiKeys:
    """Asks for one of some keys as bearer token, everywhere but on the open paths."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._is_known(key.strip()):
                await error_response(self._refusal())(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_known(self, key: str) -> bool:
        """In a time that depends neither on the keys nor on where they differ."""
        digest = _digest(key.encode("latin-1", "replace"))
        return any([hmac.compare_digest(digest, known) for known in self._digests])

    def _refusal(self) -> ApiError:
        return ApiError(401, "send an API key: 'Authorization: Bearer KEY'", code="invalid_api_key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
