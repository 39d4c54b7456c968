"""The server as a Ray Serve application: replicas of it behind one address.

The ingress reads a request and hands it to the replica that knows its prefix; the replica answers
it with the same application that ``multiexit serve`` runs, in its own process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from multiexit_engine.async_engine import AsyncEngine
from multiexit_engine.engine import Engine
from multiexit_engine.mode_forms import parse_decoding
from multiexit_engine.modes import DecodingMode
from multiexit_engine.serve.app import create_app
from multiexit_engine.serve.errors import ApiError, error_response
from multiexit_engine.serve.ray_metrics import merge_metrics
from multiexit_engine.serve.ray_routing import PrefixRouter, prefix_key
from multiexit_engine.serve.settings import ServerSettings

REPLICA_HEADER = b"x-replica-id"
# Ray's own options take their place.
NOT_UNDER_RAY = ("host", "port", "drain_timeout_s")
# How long the metrics of a replica are waited for that has all the requests it may have.
METRICS_S = 5.0
SCOPE = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
    "server",
)

logger = logging.getLogger(__name__)


class RayOptions(BaseModel):
    """What an application is built with.

    Attributes:
        model: a local folder, a hub id, or "demo".
        decoding: mode of the requests that name none, in its command-line form; the model's own
            way for None.
        num_replicas: engines, each in a process of its own.
        num_cpus: threads of each, and what Ray reserves for it.
        num_gpus: as ``num_cpus``.
        max_ongoing_requests: requests of one replica; further ones go to the next.
        max_queued_requests: requests that wait when all replicas are full; further ones get
            status 429.
        prefix_tokens: how much of a prompt decides about its replica.
        drain_timeout_s: seconds that running requests have to finish when a replica is stopped.
        engine: options of ``Engine.from_pretrained``.
        server: fields of ``ServerSettings``.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "demo"
    decoding: str | None = None
    num_replicas: int = Field(2, ge=1)
    num_cpus: float = Field(1, gt=0)
    num_gpus: float = Field(0, ge=0)
    max_ongoing_requests: int = Field(64, ge=1)
    max_queued_requests: int = Field(1024, ge=1)
    prefix_tokens: int = Field(32, ge=1)
    drain_timeout_s: float = Field(30, ge=0)
    engine: dict[str, Any] = {}
    server: dict[str, Any] = {}

    def settings(self) -> ServerSettings:
        """The server's settings; raises ValueError for one that has no meaning under Ray."""
        for name in NOT_UNDER_RAY:
            if name in self.server:
                raise ValueError(f"server: {name!r} is Ray Serve's to choose: see its HTTP options")
        return ServerSettings(**self.server)

    def mode(self) -> DecodingMode | None:
        """The default mode; raises ValueError for one that does not exist."""
        return None if self.decoding is None else parse_decoding(self.decoding)


class ModelReplica:
    """One engine behind the application."""

    async def __init__(self, options: RayOptions) -> None:  # type: ignore[misc]
        settings = options.settings()
        decoding = options.mode()
        loaded = await asyncio.to_thread(
            lambda: Engine.from_pretrained(options.model, decoding=decoding, **options.engine)
        )
        engine = AsyncEngine(loaded, max_requests=settings.max_requests)
        name = Path(options.model).resolve().name if Path(options.model).is_dir() else options.model
        self._app = create_app(engine, settings, name, version("multiexit-engine"))
        self._name = serve.get_replica_context().replica_id.unique_id.encode()
        # kept: a lifespan that nobody holds is collected, and ends the engine
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()

    async def answer(
        self, scope: dict[str, Any], body: bytes, *, prefix: str | None, place: int | None = None
    ) -> AsyncIterator[list[Message]]:
        """The ASGI messages of an answer, as many at a time as are ready.

        Args:
            scope: of the HTTP request.
            body: its whole body.
            prefix: for the router, which has chosen this replica by it.
            place: the same, in requests that are for one certain replica.
        """
        del prefix, place
        answered: asyncio.Queue[Message | None] = asyncio.Queue()
        running = asyncio.create_task(self._run(scope, body, answered))
        try:
            while (message := await answered.get()) is not None:
                ready = [message]
                while not answered.empty() and (message := answered.get_nowait()) is not None:
                    ready.append(message)
                yield ready
                if message is None:
                    break
            await running
        finally:
            # a client that has gone takes its request with it
            running.cancel()

    async def _run(
        self, scope: dict[str, Any], body: bytes, answered: asyncio.Queue[Message | None]
    ) -> None:
        request = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            for message in request:
                return message
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REPLICA_HEADER, self._name)]
            await answered.put(message)

        try:
            await self._app({**scope, "state": {}}, receive, send)
        finally:
            await answered.put(None)


class Ingress:
    """Forwards requests to replicas and streams their answers back.

    A request whose replica dies before its answer has begun is given to another one.
    """

    def __init__(self, replicas: DeploymentHandle, options: RayOptions) -> None:
        self._replicas = replicas.options(method_name="answer", stream=True)
        self._max_body_bytes = options.settings().max_body_bytes
        self._prefix_tokens = options.prefix_tokens
        self._num_replicas = options.num_replicas

    async def __call__(self, request: Request) -> Response:
        if request.url.path == "/metrics":
            return await self._metrics(request)
        body = await self._body(request)
        scope = _plain(request)
        prefix = prefix_key(scope["path"], body, self._prefix_tokens)
        for _ in range(1 + self._num_replicas):
            messages = self._messages(scope, body, prefix)
            try:
                start = await anext(messages)
            except RayActorError:
                logger.warning("a replica died before it answered; trying another")
            except BackPressureError:
                return error_response(ApiError(429, "all replicas are full", code="queue_full"))
            else:
                return _response(start, messages)
        return error_response(ApiError(503, "the replicas died one after the other"))

    async def _metrics(self, request: Request) -> Response:
        """What all replicas that answer count, each sample with its replica."""
        scope = _plain(request)
        pages: dict[str, str] = {}
        # One after the other: Ray may give requests of one caller each other's replica.
        for place in range(self._num_replicas):
            try:
                start, content = await self._whole(scope, place)
            except (RayActorError, BackPressureError, TimeoutError) as error:
                logger.warning("metrics without a replica: %r", error)
                continue
            if start["status"] != 200:
                return _response(start, _one({"body": content}))
            pages[dict(start["headers"])[REPLICA_HEADER].decode()] = content.decode()
        return Response(merge_metrics(pages), media_type=CONTENT_TYPE_LATEST)

    async def _whole(self, scope: dict[str, Any], place: int) -> tuple[Message, bytes]:
        """A replica's answer to a request without a body."""
        async with asyncio.timeout(METRICS_S):
            start, *rest = [m async for m in self._messages(scope, b"", None, place)]
        return start, b"".join(message.get("body", b"") for message in rest)

    async def _body(self, request: Request) -> bytes:
        """The body; of one that is too long just enough for the replica to refuse it."""
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                break
        return body

    async def _messages(
        self, scope: dict[str, Any], body: bytes, prefix: str | None, place: int | None = None
    ) -> AsyncIterator[Message]:
        answer = self._replicas.remote(scope, body, prefix=prefix, place=place)
        try:
            async for ready in answer:
                for message in ready:
                    yield message
        finally:
            answer.cancel()


def build(options: RayOptions | dict[str, Any]) -> serve.Application:
    """An application for ``serve.run``, or for ``serve run`` with ``key=value`` arguments.

    Raises:
        ValueError: an option is wrong; what the model decides, it says when it is deployed.
    """
    # Ray hands over a dict: it does not read annotations that are strings
    options = RayOptions.model_validate(options)
    options.settings()
    options.mode()
    replicas = serve.deployment(
        name="ModelReplica",
        num_replicas=options.num_replicas,
        max_ongoing_requests=options.max_ongoing_requests,
        max_queued_requests=options.max_queued_requests,
        graceful_shutdown_timeout_s=options.drain_timeout_s,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
    )(ModelReplica)
    ingress = serve.deployment(
        name="Ingress",
        max_ongoing_requests=options.num_replicas * options.max_ongoing_requests
        + options.max_queued_requests,
        ray_actor_options={"num_cpus": 0},
    )(Ingress)
    return ingress.bind(replicas.bind(options), options)


def _plain(request: Request) -> dict[str, Any]:
    """The parts of a request's scope that another process can read."""
    return {name: request.scope[name] for name in SCOPE if name in request.scope}


def _response(start: Message, messages: AsyncIterator[Message]) -> Response:
    response = StreamingResponse(_bodies(messages), start["status"])
    response.raw_headers = list(start["headers"])
    return response


async def _one(message: Message) -> AsyncIterator[Message]:
    yield message


async def _bodies(messages: AsyncIterator[Message]) -> AsyncIterator[bytes]:
    async with aclosing(messages):  # type: ignore[type-var]
        async for message in messages:
            yield message["body"]
