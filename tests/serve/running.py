"""Real servers on loopback: in a thread where a test looks into the engine, else as a process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from multiexit_engine import AsyncEngine, Engine
from multiexit_engine.serve.app import create_app
from multiexit_engine.serve.server import Server, listen, make_server
from multiexit_engine.serve.settings import ServerSettings

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
COMMAND = [sys.executable, "-c", "from multiexit_engine.cli import app; app()"]


@dataclass
class Running:
    """A server in a thread of this process."""

    url: str
    engine: AsyncEngine
    server: Server

    @property
    def has_all_blocks(self) -> bool:
        stats = self.engine.stats()
        is_empty = not self.engine.num_requests and not self.engine._engine._core.requests
        return is_empty and stats.num_free_kv_blocks == stats.num_kv_blocks

    def wait_until_empty(self, seconds: float = 10.0) -> None:
        """Every request has left and every block is free again, in a short while."""
        end = time.monotonic() + seconds
        while not self.has_all_blocks and time.monotonic() < end:
            time.sleep(0.01)
        assert self.has_all_blocks, self.engine.stats()
        self.engine._engine._scheduler.check_integrity()


@contextmanager
def serving(engine: Engine, **settings: object) -> Iterator[Running]:
    """A server on a free port of loopback, for the time of the block."""
    wanted = ServerSettings(port=0, **settings)
    async_engine = AsyncEngine(engine, max_requests=wanted.max_requests)
    app = create_app(async_engine, wanted, "demo", "0")
    listener = listen(wanted)
    server = make_server(app, async_engine, wanted)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", async_engine, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class Process:
    """``multiexit serve`` as a process of its own, on a free port."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._process = subprocess.Popen(
            [*COMMAND, "serve", "demo", "--port", "0", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )
        self.lines: list[dict] = []
        self.url = self._wait_for("listening")["url"]
        self._wait_for("Application startup complete.")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = 30) -> int:
        """The exit status; ``lines`` then holds the whole log."""
        _, rest = self._process.communicate(timeout=seconds)
        self.lines += [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
        return self._process.returncode

    def _wait_for(self, message: str) -> dict:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            assert line.startswith("{"), line + self._process.stderr.read()
            self.lines.append(json.loads(line))
            if self.lines[-1]["message"] == message:
                return self.lines[-1]
        raise AssertionError(f"no {message!r} in {self.lines}")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def events_of(body: str) -> list[dict]:
    """The data of server-sent events; the last one must be [DONE]."""
    data = re.findall(r"data: (.*)\n\n", body)
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]
