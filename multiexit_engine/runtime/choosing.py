"""From the states of logit rows to tokens, beam candidates and scores, on the host.

Joins decoding with what requests ask for. Knows nothing of layers, of the cache, or of how the
states came to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from multiexit_engine.batch import BeamCandidates, StepOutput
from multiexit_engine.decoding.beam import beam_candidates
from multiexit_engine.decoding.exits import (
    Draws,
    EditsOf,
    draft_tokens,
    gives_tokens,
    mode_scores,
    mode_tokens,
    no_candidates,
    no_premature_layers,
)
from multiexit_engine.decoding.plan import ExitPlanner
from multiexit_engine.decoding.processors import allowed_tokens, process_scores, token_edits
from multiexit_engine.decoding.sampler import (
    TokenRow,
    choose_tokens,
    needs_distribution,
    needs_scores,
    pick_tokens,
    token_logprobs,
)
from multiexit_engine.layers.exit_heads import ExitHeads
from multiexit_engine.ops import device_kind
from multiexit_engine.request import ChosenToken, Request, ScoredToken, sequence_seed
from multiexit_engine.runtime.logit_rows import LogitRow, allowed_masks, token_row
from multiexit_engine.runtime.logit_slices import LogitSlice
from multiexit_engine.transfer import to_device, to_host

NOT_A_NUMBER = "its mode gave NaN as the score of a token"
NO_TOKEN_LEFT = "its mode and its parameters together leave no token to choose"
NO_TOKEN_IN_FORM = "its structured_outputs and its other parameters together leave no token"
MAX_LOGIT_ROWS = 256  # rows of a float32 [rows, vocab] tensor made at once: 51 MB at GPT-2's vocab


# what a row gave: its token (``n`` of them after a prompt), or why it has none
Choice: TypeAlias = list[ChosenToken] | str


class TokenChooser:
    """Chooses and scores tokens with the heads of one model."""

    def __init__(self, heads: ExitHeads, planner: ExitPlanner, device: torch.device) -> None:
        self._heads = heads
        self._planner = planner
        self._device = device

    def slices(self, rows: Sequence[LogitRow]) -> list[LogitSlice]:
        """Rows that choose tokens, in at most two slices: direct ones and others."""
        with_edits = device_kind(self._device) == "cuda"
        direct, scored = _split(rows, [self.is_direct(row, with_edits) for row in rows])
        has_edits = not all(self.is_direct(row) for row in direct)
        found = [self._slice(direct, True, has_edits)] if direct else []
        return [*found, self._slice(scored)] if scored else found

    def draft_slices(self, rows: Sequence[LogitRow]) -> list[LogitSlice]:
        """The same of rows that draft: direct ones have no edits, so that they may look at less."""
        direct, scored = _split(rows, [self.is_direct(row) for row in rows])
        found = [self._slice(direct, True)] if direct else []
        return [*found, self._slice(scored)] if scored else found

    def joined(self, slices: Sequence[LogitSlice]) -> list[LogitSlice]:
        """The same rows, whose states are all there, with the direct ones in one slice."""
        direct = [part for part in slices if part.is_direct]
        if len(direct) < 2:
            return list(slices)
        whole = self._slice([row for part in direct for row in part.rows], is_direct=True)
        start = 0
        for part in direct:
            whole.take_over(part, start)
            start += len(part.rows)
        return [whole, *(part for part in slices if not part.is_direct)]

    def scored_slices(self, rows: Sequence[LogitRow]) -> list[LogitSlice]:
        """Rows whose distributions are looked at as a whole, a limited number in each slice."""
        steps = range(0, len(rows), MAX_LOGIT_ROWS)
        return [self._slice(list(rows[i : i + MAX_LOGIT_ROWS])) for i in steps]

    def scores(
        self,
        part: LogitSlice,
        allowed: Sequence[Tensor | None] = (),
        num_candidates: Tensor | None = None,
        premature_layers: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, str]]:
        """See ``mode_scores``."""
        found = num_candidates, premature_layers
        return mode_scores(part.plan, part.taps, self._heads, allowed, *found)

    def choose(self, part: LogitSlice, output: StepOutput) -> list[tuple[LogitRow, Choice]]:
        """What each row gave; the candidates of beams and of contrasts go to the output."""
        counts = no_candidates(part.plan, self._device)
        if part.is_direct:
            return self._choose_directly(part, counts, output)
        allowed = self._allowed(part.rows)
        layers = no_premature_layers(part.plan, self._device)
        scores, failures = self.scores(part, allowed, counts, layers)
        beams: dict[str, list[int]] = {}
        plain: list[int] = []
        chosen: list[tuple[LogitRow, Choice]] = []
        for index, row in enumerate(part.rows):
            request = row.sequence.request
            if index in failures:
                chosen.append((row, failures[index]))
            elif request.is_beam_search:
                beams.setdefault(request.request_id, []).append(index)
            else:
                plain.append(index)
        if plain:
            rows = [part.rows[i] for i in plain]
            own = [allowed[i] for i in plain]
            chosen += zip(rows, self._choose_tokens(rows, plain, scores, own), strict=True)
        failed = {part.rows[i].sequence.request.request_id for i in failures}
        for request_id, indices in beams.items():
            if request_id not in failed:
                indices.sort(key=lambda i: part.rows[i].sequence.index)
                self._choose_beams(part, indices, scores, output)
        if counts is not None:
            output.note_candidates(*to_host([counts]))
        return chosen if layers is None else _with_layers(chosen, part.rows, layers)

    def drafts(self, part: LogitSlice, num_tokens: int) -> Tensor:
        """[rows] int64 tokens on the device, for rows of one exit that are never reported.

        Direct rows look at the first ``num_tokens`` tokens of the vocabulary only.
        """
        if part.is_direct:
            draws = self._draws(part.rows)
            return draft_tokens(part.plan, part.taps, self._heads, draws, num_tokens)
        allowed = self._allowed(part.rows)
        scores, _ = self.scores(part, allowed)
        pairs = zip(part.rows, allowed, strict=True)
        return choose_tokens(scores, [token_row(row)._replace(allowed=own) for row, own in pairs])

    def is_direct(self, row: LogitRow, with_edits: bool = False) -> bool:
        """Whether a row's token is all that is wanted of its distribution, after edits at most."""
        request = row.sequence.request
        params = request.sampling
        if with_edits:
            is_seen = needs_distribution(params)
        else:
            is_seen = needs_scores(params, row.num_output_tokens, request.bad_words)
        return (
            not request.is_beam_search
            and _num_choices(row) == 1
            and gives_tokens(row.mode)
            and request.forced_token_id(row.num_output_tokens) is None
            and not is_seen
        )

    def takes_best(self, row: LogitRow) -> bool:
        """Whether a row's token is just the best one of its mode."""
        return row.sequence.request.sampling.is_greedy and self.is_direct(row)

    def score(self, part: LogitSlice, output: StepOutput) -> list[tuple[LogitRow, ScoredToken]]:
        """The score of each row's given token."""
        scores, failures = self.scores(part)
        for row, message in failures.items():
            output.failures[part.rows[row].sequence.request.request_id] = message
        requests = [row.sequence.request for row in part.rows]
        targets = [row.target for row in part.rows]
        asked = [request.sampling.prompt_logprobs for request in requests]
        num_top = _num_alternatives(asked, scores.shape[1]) or 0
        wanted = to_device(targets, scores.device)
        found = token_logprobs(scores, wanted, num_top)
        best = scores.argmax(-1)
        greedy, tokens, *logprobs = to_host([best, wanted, *found])
        results: list[tuple[LogitRow, ScoredToken]] = []
        for i, request in enumerate(requests):
            chosen = _chosen(tokens, logprobs, i, asked[i] or 0)
            assert chosen.logprob is not None and chosen.rank is not None
            if math.isnan(chosen.logprob):
                output.failures[request.request_id] = NOT_A_NUMBER
            scored = ScoredToken(
                chosen.token_id,
                chosen.logprob,
                chosen.rank,
                greedy[i] == chosen.token_id,
                chosen.alternatives,
            )
            results.append((part.rows[i], scored))
        return results

    def _slice(
        self, rows: list[LogitRow], is_direct: bool = False, has_edits: bool = False
    ) -> LogitSlice:
        plan = self._planner.plan([row.mode for row in rows])
        return LogitSlice(rows, plan, is_direct, has_edits)

    def _edits(self, part: LogitSlice) -> EditsOf | None:
        """What gives the edits of some of a slice's rows, in their order."""
        if not part.has_edits:
            return None
        rows = [token_row(row) for row in part.rows]
        masks = allowed_masks(part.rows)
        vocab_size, device = self._planner.config.vocab_size, self._device
        return lambda order: token_edits(
            [rows[i] for i in order], [masks[i] for i in order], vocab_size, device
        )

    def _choose_directly(
        self, part: LogitSlice, counts: Tensor | None, output: StepOutput
    ) -> list[tuple[LogitRow, Choice]]:
        draws = self._draws(part.rows)
        chosen = mode_tokens(part.plan, part.taps, self._heads, draws, counts, self._edits(part))
        wanted = [*chosen, *([] if counts is None else [counts])]
        tokens, logprobs, *host_counts = to_host(wanted)
        output.note_candidates(*host_counts)
        return [
            (row, _direct_choice(row, token, logprob))
            for row, token, logprob in zip(part.rows, tokens, logprobs, strict=True)
        ]

    def _choose_tokens(
        self,
        rows: list[LogitRow],
        indices: list[int],
        scores: Tensor,
        allowed: list[Tensor | None],
    ) -> list[Choice]:
        copies = [_num_choices(row) for row in rows]
        source = [i for i, count in zip(indices, copies, strict=True) for _ in range(count)]
        wanted = [
            token_row(row, copy)._replace(allowed=own)
            for row, count, own in zip(rows, copies, allowed, strict=True)
            for copy in range(count)
        ]
        if source != list(range(scores.shape[0])):
            scores = scores[to_device(source, scores.device)]
        processed = process_scores(scores, wanted)
        tokens = pick_tokens(processed, wanted)
        chosen_scores = processed.gather(1, tokens[:, None])[:, 0]
        logprobs = _alternatives(scores, tokens, wanted)
        host_tokens, host_scores, *host_logprobs = to_host([tokens, chosen_scores, *logprobs])

        start = 0
        choices: list[Choice] = []
        for row, count in zip(rows, copies, strict=True):
            own, start = range(start, start + count), start + count
            if any(math.isnan(host_scores[i]) for i in own):
                choices.append(NOT_A_NUMBER)
                continue
            if any(host_scores[i] == -math.inf for i in own):
                choices.append(_why_no_token(row))
                continue
            asked = row.sequence.request.sampling.logprobs
            choices.append([_chosen(host_tokens, host_logprobs, i, asked) for i in own])
        return choices

    def _choose_beams(
        self, part: LogitSlice, indices: list[int], scores: Tensor, output: StepOutput
    ) -> None:
        beams = [part.rows[i] for i in indices]
        request = beams[0].sequence.request
        rows = [token_row(beam) for beam in beams]
        count = beam_candidate_count(request, rows[0])
        running = [beam.sequence.cumulative_logprob for beam in beams]
        own = scores[to_device(indices, scores.device)]
        values, ids = beam_candidates(own, rows, running, min(count, own.shape[1]))
        host_values, host_ids = to_host([values, ids])
        if any(math.isnan(value) for beam in host_values for value in beam):
            output.failures[request.request_id] = NOT_A_NUMBER
            return
        output.beams.append((request, BeamCandidates(host_values, host_ids)))

    def _allowed(self, rows: list[LogitRow]) -> list[Tensor | None]:
        """[vocab] bool for each row whose text has a grammar, else None."""
        found_masks = enumerate(allowed_masks(rows))
        masks = {place: mask for place, mask in found_masks if mask is not None}
        vocab_size = self._planner.config.vocab_size
        unpacked = allowed_tokens([*masks.values()], vocab_size, self._device)
        found = dict(zip(masks, unpacked, strict=True))
        return [found.get(place) for place in range(len(rows))]

    def _draws(self, rows: list[LogitRow]) -> Draws:
        sequences = [row.sequence for row in rows]
        heats = [s.request.sampling.temperature for s in sequences]
        state = [
            [sequence_seed(s.request.seed, s.index) for s in sequences],
            [row.num_output_tokens for row in rows],
        ]
        seeds, positions = to_device(state, self._device)
        return Draws(to_device(heats, self._device, torch.float32), seeds, positions)


def beam_candidate_count(request: Request, row: TokenRow) -> int:
    """Candidates per beam that always leave ``num_beams`` which do not end."""
    return max(2, 1 + len(row.eos_token_ids)) * request.sampling.num_beams


def _with_layers(
    chosen: list[tuple[LogitRow, Choice]], rows: list[LogitRow], layers: Tensor
) -> list[tuple[LogitRow, Choice]]:
    """What the rows gave, with the layers that DoLa contrasted them with, -1 for none."""
    layer_of = dict(zip(map(id, rows), *to_host([layers]), strict=True))
    return [
        (row, choice if isinstance(choice, str) else [t.after(layer_of[id(row)]) for t in choice])
        for row, choice in chosen
    ]


def _split(
    rows: Sequence[LogitRow], is_first: Sequence[bool]
) -> tuple[list[LogitRow], list[LogitRow]]:
    pairs = list(zip(rows, is_first, strict=True))
    return [row for row, first in pairs if first], [row for row, first in pairs if not first]


def _direct_choice(row: LogitRow, token: int, logprob: float) -> Choice:
    if math.isnan(logprob):
        return NOT_A_NUMBER
    return _why_no_token(row) if logprob == -math.inf else [ChosenToken(token)]


def _why_no_token(row: LogitRow) -> str:
    grammar = row.sequence.grammar
    if grammar is not None and grammar.error:
        return f"its grammar failed: {grammar.error}"
    return NO_TOKEN_LEFT if grammar is None else NO_TOKEN_IN_FORM


def _num_choices(row: LogitRow) -> int:
    return row.sequence.request.sampling.n if row.num_output_tokens == 0 else 1


def _chosen(
    tokens: list[int], logprobs: list[list[Any]], row: int, asked: int | None
) -> ChosenToken:
    """One row of a step's results; ``logprobs`` as ``token_logprobs`` gives them, or nothing."""
    if asked is None:
        return ChosenToken(tokens[row])
    values, ids, own, ranks = logprobs
    count = len(ids[row]) if asked == -1 else asked
    best = tuple(zip(ids[row][:count], values[row][:count], strict=True))
    return ChosenToken(tokens[row], own[row], ranks[row], best)


def _alternatives(scores: Tensor, tokens: Tensor, rows: list[TokenRow]) -> list[Tensor]:
    num_top = _num_alternatives([row.params.logprobs for row in rows], scores.shape[1])
    return [] if num_top is None else list(token_logprobs(scores, tokens, num_top))


def _num_alternatives(asked: list[int | None], vocab_size: int) -> int | None:
    """The most alternatives that any row asks for; None when no row asks."""
    counts = [vocab_size if k == -1 else min(k, vocab_size) for k in asked if k is not None]
    return max(counts, default=None)
