"""A peer in a process of its own, stopped while others are measured.

Between its turns a peer's whole process group is stopped by signal: whatever its threads would do
(spin, poll), it takes no CPU from others, and may keep the thread settings that suit it best.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")


@dataclass(frozen=True)
class Answer:
    """Tokens of each prompt, and the seconds that they took on the peer's own clock."""

    tokens: list[list[int]]
    seconds: float


class PeerProcess:
    """A server of ``peer_servers/`` that runs only while it is asked.

    Raises:
        RuntimeError: it ended before it answered; the message has the end of its log.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._command = shlex.join(command)
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        try:
            self.version: str = self._read()["version"]
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Answer:
        """Greedy tokens; the process runs from here to its answer."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        self._signal(signal.SIGSTOP)
        return Answer(answer["tokens"], answer["seconds"])

    def cpu_seconds(self) -> float:
        """CPU time that the whole process group has used so far."""
        ticks = 0
        for folder in PROC.iterdir():
            if not folder.name.isdigit():
                continue
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[2]) == self._process.pid:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process and its children."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text().splitlines()[-20:])
            raise RuntimeError(f"{self._command} ended before it answered:\n{tail}")
        message: dict[str, Any] = json.loads(line)
        return message

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
