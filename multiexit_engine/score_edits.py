"""What a request's parameters do to the scores of single tokens, kept up as its text grows.

A long text with penalties has an edit for each of its tokens, of which a step changes one. Knows
nothing of tensors, of scores or of how tokens are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from multiexit_engine.params import SamplingParams

Array: TypeAlias = NDArray[Any]

# the columns of the numbers of an edit
BIAS, PENALTY, LOSS, MORE = range(4)
_UNCHANGED = (0.0, 1.0, 0.0, 0.0)
_LEAST_ROOM = 8


class ScoreEdits(NamedTuple):
    """The tokens of one text whose scores change, each once, in no order.

    Attributes:
        tokens: [edits] int64.
        numbers: [edits, 4] float64: the bias, the penalty and the loss of ``ops.edits.TokenEdits``,
            and what a token loses besides if it comes once more.
    """

    tokens: Array
    numbers: Array


class TextEdits:
    """The edits of one text.

    Args:
        params: of its request.
        prompt_token_ids: the text's beginning.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self._params = params
        self._penalty, self._first, self._more = latest_edit(params)
        self._bans_all = params.no_repeat_ngram_size == 1
        self._follows = self._penalty != 1 or self._first != 0 or self._more != 0
        self._penalised: set[int] = set()
        self._output: list[int] = []
        self._places: dict[int, int] = {}
        self._counts: list[int] = []
        self._tokens = np.empty(_LEAST_ROOM, np.int64)
        self._numbers = np.empty((_LEAST_ROOM, 4))
        for token, bias in (params.logit_bias or {}).items():
            place = self._place(token)
            self._numbers[place, BIAS] = bias
        if self._penalty != 1 or self._bans_all:
            self._penalised = set(prompt_token_ids)
            for token in self._penalised:
                self._update(self._place(token))
        self._num_steady = len(self._counts)

    def after(self, output: Sequence[int], banned: Iterable[int] = ()) -> ScoreEdits:
        """The edits once the text goes on with ``output``; ``banned`` may not come now.

        What an earlier output had in common with this one is not done again.
        """
        if self._follows:
            self._go_to(output)
        count = len(self._counts)
        own = dict.fromkeys(banned)
        new = [token for token in own if token not in self._places]
        tokens, numbers = self._tokens[:count], self._numbers[:count]
        if new:
            added = np.array([(*_UNCHANGED[:MORE], self._first)] * len(new))
            tokens, numbers = np.append(tokens, new), np.append(numbers, added, 0)
        else:
            tokens, numbers = tokens.copy(), numbers.copy()
        if own:
            places = [self._places[token] for token in own if token in self._places]
            numbers[[*places, *range(count, count + len(new))], LOSS] = math.inf
        return ScoreEdits(tokens, numbers)

    def _go_to(self, output: Sequence[int]) -> None:
        while len(self._output) > len(output):
            self._drop()
        if self._output != output[: len(self._output)]:
            common = zip(self._output, output, strict=False)
            same = next((n for n, (own, other) in enumerate(common) if own != other), 0)
            while len(self._output) > same:
                self._drop()
        for token in output[len(self._output) :]:
            self._add(token)

    def _add(self, token: int) -> None:
        self._output.append(token)
        place = self._place(token)
        self._counts[place] += 1
        self._update(place)

    def _drop(self) -> None:
        """Take back the last token. What was listed for it first is listed last."""
        place = self._places[token := self._output.pop()]
        self._counts[place] -= 1
        if self._counts[place] or place < self._num_steady:
            self._update(place)
        else:
            self._counts.pop()
            del self._places[token]

    def _place(self, token: int) -> int:
        """Where a token's numbers stand; new ones behind all others."""
        place = self._places.setdefault(token, len(self._counts))
        if place == len(self._counts):
            self._counts.append(0)
            if place == len(self._tokens):
                self._tokens = np.concatenate([self._tokens, self._tokens])
                self._numbers = np.concatenate([self._numbers, self._numbers])
            self._tokens[place], self._numbers[place] = token, (*_UNCHANGED[:MORE], self._first)
        return place

    def _update(self, place: int) -> None:
        """Set what depends on how often a token came."""
        count, numbers, params = self._counts[place], self._numbers[place], self._params
        is_seen = count > 0 or int(self._tokens[place]) in self._penalised
        numbers[PENALTY] = self._penalty if is_seen else 1.0
        loss = params.presence_penalty + params.frequency_penalty * count if count else 0.0
        numbers[LOSS] = math.inf if self._bans_all and is_seen else loss
        numbers[MORE] = self._more if count else self._first


def latest_edit(params: SamplingParams) -> tuple[float, float, float]:
    """What one more token of the output changes for that token.

    Its penalty, and what it loses if it is the first of its kind in the output or one of many.
    """
    ban = math.inf if params.no_repeat_ngram_size == 1 else 0.0
    more = params.frequency_penalty + ban
    return params.repetition_penalty, params.presence_penalty + more, more
