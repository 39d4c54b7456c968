"""Puts the server's parts together as one ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from multiexit_engine.async_engine import AsyncEngine
from multiexit_engine.serve import about, completions, page
from multiexit_engine.serve.errors import ErrorResponse, install_handlers
from multiexit_engine.serve.metrics import Metrics
from multiexit_engine.serve.middleware import ApiKeys, BodyLimit, RequestLog
from multiexit_engine.serve.server_state import ServerState
from multiexit_engine.serve.settings import ServerSettings, read_api_keys
from multiexit_engine.serve.texts import Texts

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The request is wrong; nothing was computed.",
        401: "An API key is needed.",
        404: "There is no such model or page.",
        413: "The body is too long.",
        429: "Too many requests live; try again after Retry-After seconds.",
        500: "The server, or the request's own numbers, failed.",
        503: "The server is shutting down.",
    }.items()
}


def create_app(
    engine: AsyncEngine, settings: ServerSettings, model_name: str, version: str
) -> FastAPI:
    """The application; it ends the engine when it ends.

    Raises:
        ValueError, OSError: as ``read_api_keys``, and for a chat template that cannot be read.
    """
    path = settings.chat_template
    template = None if path is None else path.read_text("utf-8")
    texts = Texts(engine.tokenizer, template)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine:
            yield
        texts.close()

    app = FastAPI(
        title="multiexit_engine",
        version=version,
        summary="Language models with exits, behind OpenAI's API.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        middleware=_middleware(settings),
        responses=ERRORS,
    )
    name = settings.served_model_name or model_name
    metrics = engine.observer = Metrics(engine.stats, engine.model_config, name)
    app.state.server = ServerState(engine, texts, metrics, settings, name)
    install_handlers(app)
    app.include_router(about.router)
    app.include_router(completions.router)
    app.include_router(page.router)
    return app


def _middleware(settings: ServerSettings) -> list[Middleware]:
    """The outermost first."""
    layers = [Middleware(RequestLog)]
    if settings.allow_origin:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.allow_origin),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id"],
            )
        )
    if keys := read_api_keys(settings):
        layers.append(Middleware(ApiKeys, keys=keys))
    layers.append(Middleware(BodyLimit, max_bytes=settings.max_body_bytes))
    return layers
