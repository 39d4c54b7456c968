"""Carries pieces from an engine to the coroutine that waits for them.

Lives in one event loop; knows nothing of engines or threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from multiexit_engine.outputs import RequestOutput, RequestPiece, join_pieces
from multiexit_engine.runtime.requests.intake import Prompt


class Submission:
    """Requests that were admitted together, and what of their pieces was not read yet.

    ``async for`` gives lists of (place of the prompt, piece): all that came since the last one, or
    everything at the end when it is not streamed. A slow reader costs no more than its own pieces.
    Leaving its ``with`` block early aborts what still runs and frees its blocks before the next
    step.
    """

    def __init__(
        self, request_ids: list[str], abort: Callable[[list[str]], None], *, streamed: bool
    ) -> None:
        self._places = {request_id: place for place, request_id in enumerate(request_ids)}
        self._living = set(request_ids)
        self._abort = abort
        self._streamed = streamed
        self._inbox: list[tuple[int, RequestPiece]] = []
        self._has_mail = asyncio.Event()

    def deliver(self, piece: RequestPiece) -> None:
        """Take a piece that the engine made."""
        self._inbox.append((self._places[piece.request_id], piece))
        if piece.finished:
            self._living.discard(piece.request_id)
        if self._streamed or not self._living:
            self._has_mail.set()

    def __aiter__(self) -> Submission:
        return self

    async def __anext__(self) -> list[tuple[int, RequestPiece]]:
        if not self._inbox and not self._living:
            raise StopAsyncIteration
        await self._has_mail.wait()
        self._has_mail.clear()
        mail, self._inbox = self._inbox, []
        return mail

    async def outputs(self, prompts: Sequence[Prompt]) -> list[RequestOutput]:
        """The whole outputs of all prompts, once the last one has finished."""
        pieces: list[list[RequestPiece]] = [[] for _ in prompts]
        async for mail in self:
            for place, piece in mail:
                pieces[place].append(piece)
        return [
            join_pieces(parts, prompt if isinstance(prompt, str) else None)
            for parts, prompt in zip(pieces, prompts, strict=True)
        ]

    def __enter__(self) -> Submission:
        return self

    def __exit__(self, *error: object) -> None:
        if self._living:
            self._abort(sorted(self._living))
            self._living.clear()
