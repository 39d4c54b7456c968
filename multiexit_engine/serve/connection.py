"""What a connection needs beside FastAPI: noticing that a client has gone, and sending events.

Knows ASGI; nothing of models.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from multiexit_engine.serve.errors import ClientHasGone

_Result = TypeVar("_Result")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of some work, which is cancelled when the client goes.

    Raises:
        ClientHasGone: the client closed the connection first.
    """
    task, watch = asyncio.create_task(work), asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientHasGone
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events as they come.

    A client that reads slowly holds up only its own events: ``send`` waits for it, and what comes
    meanwhile is sent as one.

    Args:
        resource: held while the events are sent, and left however they end.
        events: bodies to send.
    """

    media_type = "text/event-stream"

    def __init__(self, resource: AbstractContextManager[Any], events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._resource = resource
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._resource:
            await unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        async for body in self._events:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def event(data: Any) -> bytes:
    """One server-sent event with JSON data."""
    return b"data: " + to_json(data) + b"\n\n"


class EventEnvelope:
    """What stays the same in the events of a stream, written once.

    Args:
        head: fields before the changing one, at least one.
        name: of the field that changes.
        tail: fields after it.
    """

    def __init__(self, head: dict[str, Any], name: str, tail: dict[str, Any]) -> None:
        after = to_json(tail)[1:] if tail else b"}"
        self._before = b"data: " + to_json(head)[:-1] + b"," + to_json(name) + b":"
        self._after = (b"," if tail else b"") + after + b"\n\n"

    def event(self, value: Any) -> bytes:
        """One server-sent event, as ``event`` writes it."""
        return self._before + to_json(value) + self._after


def to_json(data: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return orjson.dumps(data)
