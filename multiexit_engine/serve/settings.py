"""What a server may be told, beside its engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from multiexit_engine.checks import is_finite, is_int, reject

API_KEYS_VARIABLE = "MULTIEXIT_API_KEYS"


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How a server listens, what it lets in, and what it writes down.

    Attributes:
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        served_model_name: what clients call the model; by default the name it was loaded by.
        api_key: key that clients must send as a bearer token; without any the server is open.
        api_key_file: file with one key on each line.
        allow_origin: origin whose pages may call the server (CORS), or *; by default none may.
        max_requests: most prompts alive at once, running or waiting; further ones get status 429.
        max_prompts: most prompts of one HTTP request.
        max_logprobs: most alternatives that a request may ask for at each token.
        max_body_bytes: longest body of an HTTP request.
        drain_timeout_s: seconds that running requests have to finish after SIGTERM.
        chat_template: file with a Jinja template, instead of the tokenizer's own.
        log_prompts: write the text of prompts to the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_key: tuple[str, ...] = ()
    api_key_file: Path | None = None
    allow_origin: tuple[str, ...] = ()
    max_requests: int = 1024
    max_prompts: int = 128
    max_logprobs: int = 20
    max_body_bytes: int = 4_194_304
    drain_timeout_s: float = 30.0
    chat_template: Path | None = None
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_prompts", "max_body_bytes"):
            if not is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise reject(name, getattr(self, name), "an integer, 1 or more")
        if not is_int(self.max_logprobs) or self.max_logprobs < 0:
            raise reject("max_logprobs", self.max_logprobs, "an integer, 0 or more")
        if not is_int(self.port) or not 0 <= self.port < 2**16:
            raise reject("port", self.port, "in 0..65535")
        if not is_finite(self.drain_timeout_s) or self.drain_timeout_s < 0:
            raise reject("drain_timeout_s", self.drain_timeout_s, "a finite number, 0 or more")


def read_api_keys(
    settings: ServerSettings, environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """All keys: of the settings, of their file, and of the environment, there parted by commas.

    Raises:
        ValueError: a source is there, but holds no key: the server would be open by mistake.
        OSError: the file cannot be read.
    """
    keys = list(settings.api_key)
    if any(not key.strip() for key in keys):
        raise ValueError("api_key: a key is empty")
    if settings.api_key_file is not None:
        lines = settings.api_key_file.read_text("utf-8").splitlines()
        keys += _some(lines, f"api_key_file={settings.api_key_file}")
    if API_KEYS_VARIABLE in environment:
        keys += _some(environment[API_KEYS_VARIABLE].split(","), API_KEYS_VARIABLE)
    return tuple(key.strip() for key in keys)


def _some(candidates: list[str], source: str) -> list[str]:
    keys = [key for key in candidates if key.strip()]
    if not keys:
        raise ValueError(f"{source} holds no key: write one, or take the setting away")
    return keys
