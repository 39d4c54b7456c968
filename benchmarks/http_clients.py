"""Clients of an OpenAI-compatible server, on plain sockets: they share the CPU with the server.

A request is one connection. What counts is when its events come.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any

from report import quantile


@dataclass
class Stream:
    """When a request was sent and when its events came, in seconds of ``perf_counter``."""

    sent: float
    events: list[float] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def first(self) -> float:
        """Seconds to the first event."""
        return self.events[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between events."""
        return [b - a for a, b in zip(self.events, self.events[1:], strict=False)]


async def stream(port: int, body: dict[str, Any]) -> Stream:
    """One streamed completion to its end.

    Raises:
        RuntimeError: the server answered with an error.
    """
    content = json.dumps(body | {"stream": True}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    found = Stream(time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        writer.write(head.encode() + content)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status!r}: {(await reader.read()).decode()}")
        async for line in reader:
            if line.startswith(b"data: {"):
                _note(found, line)
    finally:
        writer.close()
        await writer.wait_closed()
    return found


def _note(found: Stream, line: bytes) -> None:
    now = time.perf_counter()
    # reading every event as JSON would take the server's CPU
    if b'"finish_reason":null' in line and b'"text":""' not in line:
        found.events.append(now)
        return
    event = json.loads(line[6:])
    if "error" in event:
        raise RuntimeError(line.decode())
    if usage := event.get("usage"):
        found.num_tokens = usage["completion_tokens"]
    # an event of nothing but usage or the reason of the end adds no text
    if any(choice["text"] for choice in event["choices"]):
        found.events.append(now)


@dataclass(frozen=True)
class Figures:
    """Of one load: what clients saw."""

    tokens_per_s: float
    ttft_s: dict[str, float]
    itl_s: dict[str, float]
    seconds: float

    @staticmethod
    def of(streams: Sequence[Stream], new_tokens: int) -> Figures:
        """Raises RuntimeError if a stream is shorter than was asked."""
        short = [one.num_tokens for one in streams if one.num_tokens != new_tokens]
        if short:
            raise RuntimeError(f"streams of {short} tokens instead of {new_tokens}")
        seconds = max(s.events[-1] for s in streams) - min(s.sent for s in streams)
        gaps = [gap for one in streams for gap in one.gaps]
        firsts = [one.first for one in streams]
        return Figures(
            new_tokens * len(streams) / seconds, _quantiles(firsts), _quantiles(gaps), seconds
        )


def _quantiles(values: list[float]) -> dict[str, float]:
    return {f"p{percent}": quantile(values, percent / 100) for percent in (50, 95, 99)}


async def together(port: int, bodies: Sequence[dict[str, Any]], num_clients: int) -> list[Stream]:
    """Each of some clients sends its next request when its last one has ended."""
    waiting = list(reversed(bodies))

    async def client() -> list[Stream]:
        found = []
        while waiting:
            found.append(await stream(port, waiting.pop()))
        return found

    parts = await _all([client() for _ in range(num_clients)])
    return [one for part in parts for one in part]


async def arriving(port: int, bodies: Sequence[dict[str, Any]], rate: float) -> list[Stream]:
    """Requests arrive by chance, ``rate`` per second (Poisson), at the same times for all."""
    draw = random.Random(0)

    async def later(delay: float, body: dict[str, Any]) -> Stream:
        await asyncio.sleep(delay)
        return await stream(port, body)

    delay, calls = 0.0, []
    for body in bodies:
        calls.append(later(delay, body))
        delay += draw.expovariate(rate)
    return await _all(calls)


async def _all(calls: Sequence[Awaitable[Any]]) -> list[Any]:
    return list(await asyncio.gather(*calls))
