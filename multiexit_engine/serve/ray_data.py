"""Prompts of a Ray dataset: a callable that holds an engine, for ``Dataset.map_batches``.

Knows the engine's face; Ray calls it, so it imports nothing of Ray.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from multiexit_engine.engine import Engine
from multiexit_engine.modes import DecodingMode
from multiexit_engine.outputs import RequestPiece, join_pieces
from multiexit_engine.params import SamplingParams
from multiexit_engine.runtime.requests.intake import Prompt

Batch = dict[str, Any]


class BatchGenerator:
    """Continues the prompts of a batch: ``dataset.map_batches(BatchGenerator, concurrency=2)``.

    Each of Ray's workers makes one, with an engine that stays. A prompt's tokens are those of
    ``Engine.generate``, whatever batch it comes in.

    Args:
        model: a local folder, a hub id, or "demo".
        sampling: for all prompts; greedy for None. Only one continuation of each prompt is taken.
        decoding: mode of all prompts; the engine's default for None.
        column: holds the prompts: texts or lists of token ids.
        **engine: options of ``Engine.from_pretrained``.

    Raises:
        ValueError: ``sampling`` asks for several continuations, or as ``Engine.from_pretrained``.
    """

    def __init__(
        self,
        model: str = "demo",
        sampling: SamplingParams | None = None,
        decoding: DecodingMode | None = None,
        column: str = "prompt",
        **engine: Any,
    ) -> None:
        if sampling is not None and sampling.n > 1:
            raise ValueError(f"sampling has n={sampling.n}: a row holds one text; repeat the rows")
        self._sampling = sampling
        self._decoding = decoding
        self._column = column
        self._engine = Engine.from_pretrained(model, **engine)

    def __call__(self, batch: Batch) -> Batch:
        """The batch with four columns more: text, token_ids, finish_reason and error.

        A prompt that cannot be run gets an error beside an empty text, and harms no other.
        """
        answers = self._generate([_as_prompt(value) for value in batch[self._column]])
        columns: Batch = {name: [answer[name] for answer in answers] for name in _empty("")}
        columns["token_ids"] = _ragged(columns["token_ids"])
        return {**batch, **columns}

    def _generate(self, prompts: list[Prompt]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = [{} for _ in prompts]
        places: dict[str, int] = {}
        for place, prompt in enumerate(prompts):
            try:
                name = self._engine.add_request(
                    prompt, self._sampling, self._decoding, streamed=False
                )
                places[name] = place
            except ValueError as error:
                answers[place] = _empty(str(error))
        pieces: dict[str, list[RequestPiece]] = {name: [] for name in places}
        while self._engine.has_unfinished():
            for piece in self._engine.step_pieces():
                pieces[piece.request_id].append(piece)
        for name, place in places.items():
            answers[place] = _answer(pieces[name])
        return answers


def _as_prompt(value: Any) -> Prompt:
    return str(value) if isinstance(value, str) else [int(token) for token in value]


def _answer(pieces: list[RequestPiece]) -> dict[str, Any]:
    output = join_pieces(pieces, None)
    (completion,) = output.outputs
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": str(completion.finish_reason),
        "error": output.error or "",
    }


def _empty(error: str) -> dict[str, Any]:
    return {"text": "", "token_ids": [], "finish_reason": "error", "error": error}


def _ragged(rows: list[list[int]]) -> np.ndarray[Any, Any]:
    """Rows of their own lengths, which Ray stores as a list column."""
    column = np.empty(len(rows), dtype=object)
    for place, row in enumerate(rows):
        column[place] = np.array(row, dtype=np.int64)
    return column
