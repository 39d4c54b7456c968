"""Runs an application until it is told to stop, and then lets running requests finish."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from multiexit_engine.async_engine import AsyncEngine
from multiexit_engine.serve.settings import ServerSettings

ABORTED = 1
# For the last bytes of answers whose requests have ended.
LAST_BYTES_S = 5
KEEP_ALIVE_S = 75

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """A server that drains.

    The first SIGTERM or SIGINT makes it refuse new requests with status 503; it exits with status
    0 once the running ones have finished. A second signal, or the timeout, aborts them; it then
    exits with status 1.
    """

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, drain_timeout_s: float) -> None:
        super().__init__(config)
        self.has_aborted = False
        self._engine = engine
        self._drain_timeout_s = drain_timeout_s
        self._second_signal = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or stop draining; called by uvicorn for each signal."""
        if self._draining is None:
            logger.info("draining", extra={"fields": {"signal": signal.Signals(sig).name}})
            self._engine.stop_accepting()
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self._second_signal.set()

    async def _drain(self) -> None:
        idle = asyncio.create_task(self._engine.wait_idle())
        hurry = asyncio.create_task(self._second_signal.wait())
        await asyncio.wait(
            {idle, hurry}, timeout=self._drain_timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if not idle.done():
            logger.warning("aborting", extra={"fields": {"requests": self._engine.num_requests}})
            self.has_aborted = True
            self._engine.abort_all()
        for task in (idle, hurry):
            task.cancel()
        self.should_exit = True


def listen(settings: ServerSettings) -> socket.socket:
    """A listening socket; raises OSError if the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    return socket.create_server(
        (settings.host, settings.port), family=family, backlog=2048, reuse_port=False
    )


def make_server(app: FastAPI, engine: AsyncEngine, settings: ServerSettings) -> Server:
    """A server that is not running yet."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_BYTES_S,
        lifespan="on",
    )
    return Server(config, engine, settings.drain_timeout_s)


def run(app: FastAPI, engine: AsyncEngine, settings: ServerSettings) -> int:
    """Serve until a signal comes; returns the exit status."""
    listener = listen(settings)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    server = make_server(app, engine, settings)
    logger.info("listening", extra={"fields": {"url": f"http://{shown}:{port}"}})
    server.run(sockets=[listener])
    return ABORTED if server.has_aborted else 0
