"""Gives out one request's completions piece by piece while the core steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from multiexit_engine.errors import RequestFailed
from multiexit_engine.outputs import CompletionOutput
from multiexit_engine.request import Request
from multiexit_engine.runtime.core import EngineCore
from multiexit_engine.runtime.report import text_piece


def stream_request(
    core: EngineCore, request: Request, backend: Callable[[], AbstractContextManager[None]]
) -> Iterator[CompletionOutput]:
    """What each step adds to each completion; aborts the request when the caller leaves early.

    Raises:
        RequestFailed: the request's own contrast function or numbers failed.
    """
    core.add(request, streamed=True)
    num_given: dict[int, int] = {}
    ended: set[int] = set()
    try:
        while not request.is_finished:
            with backend():
                core.step()
            for sequence in request.sequences:
                start = num_given.get(sequence.index, 0)
                new = sequence.output_token_ids[start:]
                if sequence.index in ended or not (new or sequence.is_finished):
                    continue
                num_given[sequence.index] = start + len(new)
                if sequence.is_finished:
                    ended.add(sequence.index)
                yield CompletionOutput(
                    index=sequence.index,
                    text=text_piece(core, sequence),
                    token_ids=new,
                    finish_reason=sequence.finish_reason,
                    stop_reason=sequence.stop_reason,
                    exit_layers=sequence.exit_layers[start:],
                )
        if request.error is not None:
            raise RequestFailed(request.error)
    finally:
        core.forget(request.request_id)
