"""Gives out requests' completions piece by piece while the core steps."""

from __future__ import annotations

from collections.abc import Iterator

from multiexit_engine.errors import RequestFailed
from multiexit_engine.outputs import CompletionOutput, RequestPiece
from multiexit_engine.request import Request, Sequence
from multiexit_engine.runtime.requests.core_protocol import Core
from multiexit_engine.runtime.requests.report import completion_piece, request_piece


class Feed:
    """What of one request was not yet given out."""

    def __init__(self, core: Core, request: Request) -> None:
        self._core = core
        self._request = request
        self._num_given: dict[int, int] = {}
        self._ended: set[int] = set()
        self._has_given_prompt = False

    def take(self) -> list[CompletionOutput]:
        """What each completion gained since the last call; of beams nothing before their end."""
        request = self._request
        if request.is_beam_search and not request.is_finished:
            return []
        return [self._take_one(s) for s in request.sequences if self._has_new(s)]

    def take_piece(self) -> RequestPiece:
        """As ``take``, with the request's own state; its prompt's scores come with the first."""
        outputs = self.take()
        with_prompt = bool(outputs) and not self._has_given_prompt
        self._has_given_prompt |= with_prompt
        return request_piece(self._core, self._request, outputs, with_prompt=with_prompt)

    def _has_new(self, sequence: Sequence) -> bool:
        if sequence.index in self._ended:
            return False
        num_given = self._num_given.get(sequence.index, 0)
        return sequence.is_finished or sequence.num_output_tokens > num_given

    def _take_one(self, sequence: Sequence) -> CompletionOutput:
        start = self._num_given.get(sequence.index, 0)
        self._num_given[sequence.index] = sequence.num_output_tokens
        if sequence.is_finished:
            self._ended.add(sequence.index)
        return completion_piece(self._core, sequence, start)


class Feeds:
    """The feeds of all requests whose pieces are asked for."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._feeds: dict[str, Feed] = {}

    def take(self, request: Request) -> RequestPiece:
        """What is new of a request since the last call."""
        name = request.request_id
        if name not in self._feeds:
            self._feeds[name] = Feed(self._core, request)
        return self._feeds[name].take_piece()

    def forget(self, request_id: str) -> None:
        """Keep nothing of a request; unknown ids are fine."""
        self._feeds.pop(request_id, None)


def stream_request(core: Core, request: Request) -> Iterator[CompletionOutput]:
    """What each step adds to each completion; aborts the request when the caller leaves early.

    Raises:
        RequestFailed: the request's own contrast function or numbers failed.
    """
    core.add(request, streamed=True)
    feed = Feed(core, request)
    try:
        while not request.is_finished:
            core.step()
            yield from feed.take()
        if request.error is not None:
            raise RequestFailed(request.error)
    finally:
        core.forget(request.request_id)
