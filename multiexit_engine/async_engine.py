"""An engine for asyncio: one thread steps, any number of coroutines wait for its pieces.

Knows the engine's face; nothing of HTTP. All that touches the engine happens in its thread (but
compiling grammars, which any thread may do), all that touches a submission in the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from multiexit_engine.engine import Engine
from multiexit_engine.errors import EngineClosed, QueueFull, RequestFailed
from multiexit_engine.outputs import (
    CompletionOutput,
    EngineStats,
    RequestOutput,
    RequestPiece,
)
from multiexit_engine.params import DecodingMode, SamplingParams
from multiexit_engine.runtime.requests.intake import Prompt
from multiexit_engine.runtime.requests.submission import Submission

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Is told what happens to requests; called in the event loop, times as ``perf_counter``."""

    def arrived(self, request_id: str, now: float) -> None: ...

    def stepped(self, pieces: Sequence[RequestPiece], now: float) -> None: ...

    def left(self, request_id: str) -> None:
        """Nobody waits for the request any more; it had not finished."""


class AsyncEngine:
    """``Engine`` for many coroutines of one event loop.

    Requests of all callers run in one continuous batch. Use it as ``async with AsyncEngine(...)``,
    or call ``close`` at the end.

    Args:
        engine: from now on only this object may use it.
        max_requests: most requests alive at once, running or waiting.
        observer: told of arrivals, steps and departures.
    """

    def __init__(
        self, engine: Engine, *, max_requests: int = 1024, observer: Observer | None = None
    ) -> None:
        if max_requests < 1:
            raise ValueError(f"max_requests={max_requests}: must be 1 or more")
        self.config = engine.config
        self.model_config = engine.model_config
        self.tokenizer = engine.tokenizer
        self.max_requests = max_requests
        self.observer = observer
        self._engine = engine
        self._stats = engine.stats()
        self._ids = itertools.count()
        self._living: dict[str, Submission] = {}
        self._in_engine: set[str] = set()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.is_accepting = True

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, max_requests: int = 1024, **options: Any
    ) -> AsyncEngine:
        """An engine on a checkpoint; ``options`` as of ``Engine.from_pretrained``."""
        return cls(Engine.from_pretrained(model, **options), max_requests=max_requests)

    @property
    def num_requests(self) -> int:
        """Requests that somebody waits for."""
        return len(self._living)

    def stats(self) -> EngineStats:
        """The engine's counts after its last step or command."""
        return self._stats

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        decoding: DecodingMode | None = None,
    ) -> RequestOutput:
        """Continue one prompt; cancelling the caller aborts the request.

        Raises:
            ValueError: as ``Engine.generate``.
            QueueFull: ``max_requests`` live already.
            EngineClosed: it is being shut down.
            RequestFailed: the request's contrast function or numbers failed.
        """
        with await self.submit([prompt], sampling, decoding, streamed=False) as submission:
            (output,) = await submission.outputs([prompt])
        if output.error is not None:
            raise RequestFailed(output.error)
        return output

    async def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        decoding: DecodingMode | None = None,
    ) -> AsyncIterator[CompletionOutput]:
        """Continue one prompt; gives what is new as ``Engine.stream``. Raises as ``generate``."""
        if sampling is not None and sampling.num_beams > 1:
            raise ValueError("num_beams: beam search cannot be streamed, use generate")
        with await self.submit([prompt], sampling, decoding) as submission:
            async for mail in submission:
                for _, piece in mail:
                    for output in piece.outputs:
                        yield output
                    if piece.error is not None:
                        raise RequestFailed(piece.error)

    async def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None = None,
        decoding: DecodingMode | None = None,
        *,
        streamed: bool = True,
    ) -> Submission:
        """Admit all of some prompts, or none of them.

        Raises:
            ValueError, QueueFull, EngineClosed: as ``generate``; nothing is then left behind.
        """
        loop = self._started()
        self._check_room(len(prompts))
        if sampling is not None and sampling.structured_outputs is not None:
            # may take a second, which no other request should wait for
            await asyncio.to_thread(self._engine.compile_structure, sampling)
            self._check_room(len(prompts))
        names = [f"request-{next(self._ids)}" for _ in prompts]
        submission = Submission(names, self._abort, streamed=streamed)
        now = perf_counter()
        for name in names:
            self._living[name] = submission
            if self.observer is not None:
                self.observer.arrived(name, now)
        self._is_idle.clear()
        admitted: asyncio.Future[None] = loop.create_future()

        def admit() -> None:
            error: BaseException | None = None
            try:
                self._add_all(names, prompts, sampling, decoding, streamed)
            except Exception as caught:
                error = caught
            loop.call_soon_threadsafe(_settle, admitted, error)

        self._commands.put(admit)
        try:
            await admitted
        except BaseException:
            self._abort(names)
            raise
        return submission

    def stop_accepting(self) -> None:
        """Refuse new requests from now on; those that live go on."""
        self.is_accepting = False

    async def wait_idle(self) -> None:
        """Return when no request lives."""
        await self._is_idle.wait()

    def abort_all(self) -> None:
        """End every living request; those who wait for one get an error."""
        living = list(self._living.items())
        self._abort([name for name, _ in living])
        for name, submission in living:
            submission.deliver(_failed(name, "the engine is being shut down"))

    async def close(self) -> None:
        """Abort what lives and end the thread."""
        self.stop_accepting()
        self.abort_all()
        self._commands.put(None)
        if self._loop is not None:
            await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncEngine:
        self._started()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def _started(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._thread.start()
        if self._loop is not loop:
            raise RuntimeError("an AsyncEngine belongs to the event loop that used it first")
        return loop

    def _check_room(self, num_prompts: int) -> None:
        if not self.is_accepting:
            raise EngineClosed("the engine takes no further requests: it is being shut down")
        if len(self._living) + num_prompts > self.max_requests:
            raise QueueFull(
                f"{len(self._living)} requests live, {num_prompts} more would exceed the limit of "
                f"{self.max_requests}: try again later"
            )

    def _abort(self, names: list[str]) -> None:
        for name in names:
            if self._living.pop(name, None) is not None and self.observer is not None:
                self.observer.left(name)
        self._note_idle()
        self._commands.put(lambda: self._drop(names))

    def _note_idle(self) -> None:
        if not self._living:
            self._is_idle.set()

    def _dispatch(self, pieces: list[RequestPiece], now: float) -> None:
        if self.observer is not None:
            self.observer.stepped([p for p in pieces if p.request_id in self._living], now)
        for piece in pieces:
            submission = self._living.get(piece.request_id)
            if submission is None:
                continue
            submission.deliver(piece)
            if piece.finished:
                del self._living[piece.request_id]
        self._note_idle()

    # From here on: the engine's thread.

    def _run(self) -> None:
        assert self._loop is not None
        while self._obey():
            try:
                pieces = self._engine.step_pieces()
            except Exception as error:
                logger.exception("a step failed; its requests are ended")
                pieces = [_failed(name, f"the engine failed: {error}") for name in self._in_engine]
                self._drop(list(self._in_engine))
            self._in_engine.difference_update(p.request_id for p in pieces if p.finished)
            self._stats = self._engine.stats()
            if pieces:
                self._loop.call_soon_threadsafe(self._dispatch, pieces, perf_counter())

    def _obey(self) -> bool:
        """Carry out the commands that came; waits for one when there is nothing to step.

        Returns False when the last command is to end.
        """
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_unfinished())
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            self._stats = self._engine.stats()

    def _add_all(
        self,
        names: list[str],
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None,
        decoding: DecodingMode | None,
        streamed: bool,
    ) -> None:
        for place, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            try:
                self._engine.add_request(
                    prompt, sampling, decoding, request_id=name, streamed=streamed
                )
            except ValueError as error:
                self._drop(names)
                raise ValueError(f"prompts[{place}]: {error}" if place else str(error)) from error
            self._in_engine.add(name)

    def _drop(self, names: list[str]) -> None:
        for name in names:
            self._engine.abort(name)
            self._in_engine.discard(name)


def _settle(admitted: asyncio.Future[None], error: BaseException | None) -> None:
    if admitted.done():
        return
    if error is None:
        admitted.set_result(None)
    else:
        admitted.set_exception(error)


def _failed(request_id: str, reason: str) -> RequestPiece:
    return RequestPiece(request_id, [], [], finished=True, error=reason)
