"""What all handlers of one server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi import Request

from multiexit_engine.async_engine import AsyncEngine
from multiexit_engine.serve.errors import ApiError
from multiexit_engine.serve.metrics import Metrics
from multiexit_engine.serve.settings import ServerSettings
from multiexit_engine.serve.texts import Texts


@dataclass(frozen=True, slots=True)
class ServerState:
    """One server's engine and settings.

    Attributes:
        engine: runs the requests.
        texts: its tokenizer, for the server.
        metrics: watches the engine.
        settings: as the server was started.
        model_name: what clients call the model.
        created: when it was loaded, in seconds since 1970.
    """

    engine: AsyncEngine
    texts: Texts
    metrics: Metrics
    settings: ServerSettings
    model_name: str
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Raise ApiError if a client asks for another model."""
        if name not in (None, self.model_name):
            raise ApiError(
                404,
                f"model={name!r}: this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )


def state_of(request: Request) -> ServerState:
    """The server's state, for a handler."""
    state: ServerState = request.app.state.server
    return state
