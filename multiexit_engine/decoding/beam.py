"""Beam search for one request, step by step the same as transformers'.

The device ranks each beam's continuations; which of them go on is decided here, on plain numbers.
Knows nothing of the model, of KV blocks, or of other requests.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from multiexit_engine.decoding.processors import TokenRow, process_scores
from multiexit_engine.transfer import to_device

# transformers' score of what must not be taken while anything else is there.
_HOPELESS = np.float32(-1e9)


@dataclass(frozen=True, slots=True)
class BeamHypothesis:
    """A sequence that beam search offers.

    Attributes:
        token_ids: the generated tokens, an ending one included.
        score: sum of log-probabilities divided by length ** length_penalty.
    """

    token_ids: list[int]
    score: float


@dataclass(frozen=True, slots=True)
class BeamStep:
    """The beams that go on, best first.

    Attributes:
        parents: for each the beam of the previous step that it continues.
        tokens: for each its new token.
        scores: for each the sum of its log-probabilities, a float32 value.
    """

    parents: list[int]
    tokens: list[int]
    scores: list[float]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A beam and its next token; or a sequence put aside, whose score has the length penalty."""

    score: np.float32
    parent: int
    token_ids: list[int]
    is_finished: bool


def beam_candidates(
    scores: Tensor, rows: Sequence[TokenRow], running: Tensor | Sequence[float], count: int
) -> tuple[Tensor, Tensor]:
    """The best continuations of every beam, with the score that the longer beam would have.

    Processors act on log-probabilities here, as in transformers' beam search.

    Args:
        scores: [beams, vocab] float32 raw scores of the request's mode.
        rows: one for each beam.
        running: [beams] sums of log-probabilities so far.
        count: how many to give per beam, at most the vocabulary.

    Returns:
        [beams, count] float32 sums with the next token, best first, and [beams, count] int64 ids.

    Source: transformers' ``_beam_search`` and ``_get_top_k_continuations``.
    """
    if not isinstance(running, Tensor):
        running = to_device(running, scores.device, scores.dtype)
    logprobs = process_scores(scores.log_softmax(-1), rows)
    values, ids = (logprobs + running[:, None]).topk(count, -1)
    return values, ids


class BeamSearch:
    """The beams of one request and the finished sequences that it keeps.

    Numbers are float32 wherever transformers' are, so order and scores agree; exact up to the
    rounding of the model's own scores.

    Args:
        num_beams: beams that run, 2 or more.
        num_return: how many results to give, at most num_beams.
        length_penalty: exponent of the length that divides a sequence's score.
        early_stopping: True stops at num_beams finished sequences; False when the best beam of now
            cannot beat the worst of them; "never" when none could, up to max_len.
        eos_token_ids: tokens that finish a sequence.
        prompt_len: tokens of the prompt.
        max_len: most tokens of prompt and output together; a sequence that long is finished.

    Source: transformers 5.23, ``_beam_search`` and the methods it calls.
    """

    def __init__(
        self,
        num_beams: int,
        num_return: int,
        length_penalty: float,
        early_stopping: bool | Literal["never"],
        eos_token_ids: Collection[int],
        prompt_len: int,
        max_len: int,
    ) -> None:
        self.num_beams = num_beams
        self.num_return = num_return
        self.length_penalty = length_penalty
        self.early_stopping = early_stopping
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_new_tokens = max_len - prompt_len
        self.is_done = False
        self._num_tokens = 0
        self._running: list[list[int]] = [[]]
        self._kept = [_Candidate(_HOPELESS, 0, [], False) for _ in range(num_beams)]

    @property
    def num_candidates(self) -> int:
        """Continuations to look at in each step: num_beams of them go on even if all others end."""
        return max(2, 1 + len(self.eos_token_ids)) * self.num_beams

    def advance(self, values: list[list[float]], ids: list[list[int]]) -> BeamStep:
        """Choose the beams that go on and put the finished ones aside.

        Args:
            values: for each beam (in the first step the one prompt) the scores of its
                ``num_candidates`` best continuations (or of the whole vocabulary), best first.
            ids: the tokens they belong to.
        """
        best = self._best_continuations(values, ids)
        self._num_tokens += 1
        running = _ranked(
            [
                _Candidate(np.float32(c.score + _HOPELESS), c.parent, c.token_ids, True)
                if c.is_finished
                else c
                for c in best
            ]
        )[: self.num_beams]
        self._keep(best)
        self._running = [c.token_ids for c in running]
        self.is_done = self._must_stop(best, running[0].score)
        return BeamStep(
            parents=[c.parent for c in running],
            tokens=[c.token_ids[-1] for c in running],
            scores=[float(c.score) for c in running],
        )

    def results(self) -> list[BeamHypothesis]:
        """The ``num_return`` best sequences, best first."""
        return [BeamHypothesis(c.token_ids, float(c.score)) for c in self._kept[: self.num_return]]

    def _best_continuations(
        self, values: list[list[float]], ids: list[list[int]]
    ) -> list[_Candidate]:
        found = [
            (np.float32(value), beam, token)
            for beam, (own_values, own_ids) in enumerate(zip(values, ids, strict=True))
            for value, token in zip(own_values, own_ids, strict=True)
        ]
        if self._num_tokens == 0:
            # transformers starts with num_beams copies of the prompt, all but one hopeless: they
            # matter when the prompt alone has too few continuations.
            copies = [(np.float32(v + _HOPELESS), beam, token) for v, beam, token in found]
            found += copies * (self.num_beams - 1)
        found.sort(key=lambda item: -item[0])
        is_last = self._num_tokens + 1 >= self.max_new_tokens
        return [
            _Candidate(
                value, beam, [*self._running[beam], token], is_last or token in self.eos_token_ids
            )
            for value, beam, token in found[: self.num_candidates]
        ]

    def _keep(self, best: list[_Candidate]) -> None:
        """Merge what just finished among the ``num_beams`` best into the kept sequences."""
        divisor = np.float32(self._num_tokens**self.length_penalty)
        merged = list(self._kept)
        for place, candidate in enumerate(best):
            is_finished = candidate.is_finished and place < self.num_beams
            score = np.float32(candidate.score / divisor)
            if not is_finished:
                score = np.float32(score + _HOPELESS)
            merged.append(_Candidate(score, candidate.parent, candidate.token_ids, is_finished))
        self._kept = _ranked(merged)[: self.num_beams]

    def _must_stop(self, best: list[_Candidate], best_running: np.float32) -> bool:
        all_kept_finished = all(c.is_finished for c in self._kept)
        if self.early_stopping is True and all_kept_finished:
            return True
        if all(c.is_finished for c in best):
            return True
        length = self._num_tokens
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_new_tokens
        reachable = np.float32(best_running / np.float32(length**self.length_penalty))
        worst = min(c.score for c in self._kept)
        return not any(reachable > (worst if c.is_finished else _HOPELESS) for c in self._kept)


def _ranked(candidates: list[_Candidate]) -> list[_Candidate]:
    return sorted(candidates, key=lambda c: -c.score)
