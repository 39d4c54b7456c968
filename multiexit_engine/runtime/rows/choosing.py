"""From the states of logit rows to tokens, beam candidates and scores, without a wait.

Joins decoding with what requests ask for. Knows nothing of layers, of the cache, or of how the
states came to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from multiexit_engine.batch import BeamCandidates, StepOutput
from multiexit_engine.decoding.beam import beam_candidates
from multiexit_engine.decoding.draws import Draws
from multiexit_engine.decoding.exits import (
    EditsOf,
    draft_choices,
    draft_tokens,
    gives_tokens,
    mode_scores,
    mode_tokens,
    no_candidates,
    no_premature_layers,
)
from multiexit_engine.decoding.plan import ExitPlanner
from multiexit_engine.decoding.processors import (
    allowed_tokens,
    asks_for_processing,
    process_scores,
    token_edits,
)
from multiexit_engine.decoding.sampler import (
    TokenRow,
    choose_several,
    needs_scores,
    needs_whole_distribution,
    pick_tokens,
    token_logprobs,
)
from multiexit_engine.layers.exit_heads import ExitHeads, Head
from multiexit_engine.ops import device_kind
from multiexit_engine.ops.best_tokens import BestTokens, no_best_tokens
from multiexit_engine.params import DoLa, Exit
from multiexit_engine.request import Request, ScoredToken
from multiexit_engine.runtime.rows.chosen_rows import (
    NOT_A_NUMBER,
    Choice,
    Coming,
    direct_choices,
    looked_at_choices,
    with_layers,
)
from multiexit_engine.runtime.rows.given_tokens import num_alternatives, score_tokens
from multiexit_engine.runtime.rows.kept_draws import KeptDraws
from multiexit_engine.runtime.rows.logit_rows import LogitRow, allowed_masks, token_row
from multiexit_engine.runtime.rows.logit_slices import LogitSlice
from multiexit_engine.transfer import ToHost, to_device

MAX_LOGIT_ROWS = 256  # rows of a float32 [rows, vocab] tensor made at once: 51 MB at GPT-2's vocab


class TokenChooser:
    """Chooses and scores tokens with the heads of one model."""

    def __init__(self, heads: ExitHeads, planner: ExitPlanner, device: torch.device) -> None:
        self._heads = heads
        self._planner = planner
        self._device = device
        self._draws = KeptDraws(device)

    def slices(self, rows: Sequence[LogitRow]) -> list[LogitSlice]:
        """Rows that choose tokens, in at most two slices: direct ones and others."""
        if not rows:
            return []
        is_fused = self._is_fused
        direct, scored = _split(rows, [self.is_direct(row, fused=is_fused) for row in rows])
        found = [self._slice(direct, True)] if direct else []
        return [*found, self._slice(scored)] if scored else found

    @property
    def _is_fused(self) -> bool:
        """Whether ops that choose tokens edit scores and list best tokens, too."""
        return device_kind(self._device) == "cuda"

    def draft_slices(self, rows: Sequence[LogitRow]) -> list[LogitSlice]:
        """The same of rows that draft: direct ones are unchanged, so that they may look at less."""
        direct, scored = _split(rows, [self.is_direct(row) for row in rows])
        found = [self._slice(direct, True)] if direct else []
        return [*found, self._slice(scored)] if scored else found

    def joined(self, slices: Sequence[LogitSlice]) -> list[LogitSlice]:
        """The same rows, whose states are all there, with the direct ones in one slice."""
        direct = [part for part in slices if part.is_direct]
        if len(direct) < 2:
            return list(slices)
        rows = [row for part in direct for row in part.rows]
        whole = self._slice(rows, True)
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

    def choose(self, part: LogitSlice) -> Coming[Choice]:
        """What each row gives; nobody waits for it here."""
        counts = no_candidates(part.plan, self._device)
        layers = no_premature_layers(part.plan, self._device)
        if part.is_direct:
            return self._choose_directly(part, counts, layers)
        allowed = self._allowed(part.rows)
        scores, failures = self.scores(part, allowed, counts, layers)
        requests = [row.sequence.request for row in part.rows]
        failed = {requests[place].request_id for place in failures}
        places = [place for place in range(len(part.rows)) if place not in failures]
        own = [place for place in places if not requests[place].is_beam_search]
        tokens = self._choose_tokens(part.rows, own, scores, allowed) if own else None
        beams = [
            self._choose_beams(part, group, scores)
            for group in _by_request(part.rows, places)
            if requests[group[0]].is_beam_search and requests[group[0]].request_id not in failed
        ]
        notes = _Notes(counts, layers)

        def read(output: StepOutput) -> list[tuple[LogitRow, Choice]]:
            chosen: list[tuple[LogitRow, Choice]] = [
                (part.rows[place], message) for place, message in failures.items()
            ]
            chosen += tokens.read(output) if tokens is not None else []
            for read_beams in beams:
                read_beams(output)
            return notes.read(chosen, part.rows, output)

        if tokens is None:
            return Coming([], None, read)
        return Coming(tokens.rows, tokens.tokens, read)

    def choose_from(self, rows: list[LogitRow], scores: Tensor) -> Coming[Choice]:
        """What rows, none of them a beam, give whose [rows, vocab] scores are there already."""
        return self._choose_tokens(rows, [*range(len(rows))], scores, self._allowed(rows))

    def drafts(self, part: LogitSlice, num_tokens: int) -> Tensor:
        """[rows] int64 tokens on the device, for rows of one exit that are never reported.

        Direct rows look at the first ``num_tokens`` tokens of the vocabulary only.
        """
        if part.is_direct:
            mode = part.rows[0].mode
            assert isinstance(mode, Exit), "an exit drafts"
            return self.direct_drafts(
                mode, part.taps[mode.layer], self.draws(part.rows), num_tokens
            )
        return self.draft_choices(part, 1)[:, 0]

    def draft_choices(self, part: LogitSlice, count: int) -> Tensor:
        """[rows, count] int64: drafts of rows that look at their scores, the best one first."""
        allowed = self._allowed(part.rows)
        scores, _ = self.scores(part, allowed)
        pairs = zip(part.rows, allowed, strict=True)
        rows = [token_row(row)._replace(allowed=own) for row, own in pairs]
        return choose_several(scores, rows, count)

    def direct_drafts(self, mode: Exit, tap: Tensor, draws: Draws, num_tokens: int) -> Tensor:
        """See ``draft_tokens``; for rows of which ``is_direct`` is true."""
        return draft_tokens(Head(mode.layer), tap, self._heads, draws, num_tokens)

    def direct_draft_choices(
        self, mode: Exit, tap: Tensor, draws: Draws, num_tokens: int, count: int
    ) -> Tensor:
        """See ``draft_choices`` of ``decoding.exits``; for rows of which ``is_direct`` is true."""
        return draft_choices(Head(mode.layer), tap, self._heads, draws, num_tokens, count)

    def is_direct(self, row: LogitRow, *, fused: bool = False) -> bool:
        """Whether ops that choose tokens give all that is wanted of a row's distribution.

        Args:
            row: to choose a token.
            fused: whether they may do more than to take the best token or to draw one: edit scores,
                narrow draws and list best tokens.
        """
        request, count = row.sequence.request, row.num_output_tokens
        params = request.sampling
        if request.is_beam_search or (params.n > 1 and not count) or not gives_tokens(row.mode):
            return False
        if request.forced_token_id(count) is not None:
            return False
        if fused and not isinstance(row.mode, DoLa):
            return not needs_whole_distribution(params)
        return not needs_scores(params, count, request.bad_words)

    def takes_best(self, row: LogitRow) -> bool:
        """Whether a row's token is just the best one of its mode."""
        return row.sequence.request.sampling.is_greedy and self.is_direct(row)

    def score(self, part: LogitSlice) -> Coming[ScoredToken]:
        """The score of each row's given token; nobody waits for it here."""
        scores, failed = self.scores(part)
        requests = [row.sequence.request for row in part.rows]
        messages = {requests[place].request_id: why for place, why in failed.items()}
        return score_tokens(part.rows, scores, messages)

    def _slice(self, rows: list[LogitRow], is_direct: bool = False) -> LogitSlice:
        return LogitSlice(rows, self._planner.plan([row.mode for row in rows]), is_direct)

    def _edits(self, part: LogitSlice) -> EditsOf | None:
        """What gives the edits of some of a slice's rows, in their order."""
        if not self._is_fused or not any(map(is_edited, part.rows)):
            return None
        rows = [token_row(row) for row in part.rows]
        masks = allowed_masks(part.rows)
        vocab_size, device = self._planner.config.vocab_size, self._device
        return lambda order: token_edits(
            [rows[i] for i in order], [masks[i] for i in order], vocab_size, device
        )

    def _choose_directly(
        self, part: LogitSlice, counts: Tensor | None, layers: Tensor | None
    ) -> Coming[Choice]:
        draws = self.draws(part.rows)
        best = self._best_tokens(part.rows)
        edits = self._edits(part)
        chosen = mode_tokens(part.plan, part.taps, self._heads, draws, counts, edits, best, layers)
        coming = ToHost([*chosen, *(best[1:] if best else ())])
        notes = _Notes(counts, layers)

        def read(output: StepOutput) -> list[tuple[LogitRow, Choice]]:
            tokens, logprobs, *told = coming.lists()
            choices = direct_choices(part.rows, tokens, logprobs, told)
            return notes.read(choices, part.rows, output)

        return Coming(part.rows, chosen[0], read)

    def _best_tokens(self, rows: Sequence[LogitRow]) -> BestTokens | None:
        """Memory for the best tokens of rows that ask for them; None where none does."""
        if not self._is_fused:
            return None
        asked = [row.sequence.request.sampling.logprobs for row in rows]
        most = num_alternatives(asked, self._planner.config.vocab_size)
        if most is None:
            return None
        counts = [-1 if count is None else min(count, most) for count in asked]
        return no_best_tokens(to_device(counts, self._device, torch.int32), most)

    def _choose_tokens(
        self,
        among: Sequence[LogitRow],
        places: list[int],
        scores: Tensor,
        allowed: list[Tensor | None],
    ) -> Coming[Choice]:
        rows = [among[place] for place in places]
        copies = [_num_choices(row) for row in rows]
        source = [i for i, count in zip(places, copies, strict=True) for _ in range(count)]
        wanted = [
            token_row(row, copy)._replace(allowed=allowed[place])
            for row, place, count in zip(rows, places, copies, strict=True)
            for copy in range(count)
        ]
        if source != list(range(scores.shape[0])):
            scores = scores[to_device(source, scores.device)]
        processed = process_scores(scores, wanted)
        tokens = pick_tokens(processed, wanted)
        chosen_scores = processed.gather(1, tokens[:, None])[:, 0]
        coming = ToHost([tokens, chosen_scores, *_alternatives(scores, tokens, wanted)])

        def read(_: StepOutput) -> list[tuple[LogitRow, Choice]]:
            found, own_scores, *logprobs = coming.lists()
            choices = looked_at_choices(rows, copies, found, own_scores, logprobs)
            return list(zip(rows, choices, strict=True))

        return Coming([among[place] for place in source], tokens, read)

    def _choose_beams(
        self, part: LogitSlice, places: list[int], scores: Tensor
    ) -> Callable[[StepOutput], None]:
        """Candidates for the beams of one request."""
        places = sorted(places, key=lambda place: part.rows[place].sequence.index)
        beams = [part.rows[place] for place in places]
        request = beams[0].sequence.request
        rows = [token_row(beam) for beam in beams]
        count = beam_candidate_count(request, rows[0])
        running = [beam.sequence.cumulative_logprob for beam in beams]
        own = scores[to_device(places, scores.device)]
        coming = ToHost(beam_candidates(own, rows, running, min(count, own.shape[1])))

        def read(output: StepOutput) -> None:
            values, ids = coming.lists()
            if any(math.isnan(value) for beam in values for value in beam):
                output.failures[request.request_id] = NOT_A_NUMBER
            else:
                output.beams.append((request, BeamCandidates(values, ids)))

        return read

    def _allowed(self, rows: list[LogitRow]) -> list[Tensor | None]:
        """[vocab] bool for each row whose text has a grammar, else None."""
        found_masks = enumerate(allowed_masks(rows))
        masks = {place: mask for place, mask in found_masks if mask is not None}
        vocab_size = self._planner.config.vocab_size
        unpacked = allowed_tokens([*masks.values()], vocab_size, self._device)
        found = dict(zip(masks, unpacked, strict=True))
        return [found.get(place) for place in range(len(rows))]

    def draws(self, rows: list[LogitRow]) -> Draws:
        """How the tokens of some rows are drawn."""
        positions = [row.num_output_tokens for row in rows]
        kept = self._draws.of([row.sequence for row in rows])
        own = to_device(positions, self._device, torch.int64)
        return Draws(kept.temperature, kept.seeds, own, kept.narrowing)


class _Notes:
    """What modes tell of rows besides tokens, on its way to the host."""

    def __init__(self, counts: Tensor | None, layers: Tensor | None) -> None:
        self._has_counts, self._has_layers = counts is not None, layers is not None
        self._coming = ToHost([note for note in (counts, layers) if note is not None])

    def read(
        self, chosen: list[tuple[LogitRow, Choice]], rows: Sequence[LogitRow], output: StepOutput
    ) -> list[tuple[LogitRow, Choice]]:
        """What rows gave with what is told of it; sizes of plausible sets go to the output."""
        found = self._coming.lists()
        if self._has_counts:
            output.note_candidates(found[0])
        return with_layers(chosen, rows, found[-1]) if self._has_layers else chosen


def is_edited(row: LogitRow) -> bool:
    """Whether penalties, biases, bans or a grammar change a row's scores."""
    request = row.sequence.request
    return asks_for_processing(request.sampling, row.num_output_tokens, request.bad_words)


def beam_candidate_count(request: Request, row: TokenRow) -> int:
    """Candidates per beam that always leave ``num_beams`` which do not end."""
    return max(2, 1 + len(row.eos_token_ids)) * request.sampling.num_beams


def _by_request(rows: Sequence[LogitRow], places: Iterable[int]) -> list[list[int]]:
    """Places of rows, those of each request together."""
    groups: dict[str, list[int]] = {}
    for place in places:
        groups.setdefault(rows[place].sequence.request.request_id, []).append(place)
    return list(groups.values())


def _split(
    rows: Sequence[LogitRow], is_first: Sequence[bool]
) -> tuple[list[LogitRow], list[LogitRow]]:
    pairs = list(zip(rows, is_first, strict=True))
    return [row for row, first in pairs if first], [row for row, first in pairs if not first]


def _num_choices(row: LogitRow) -> int:
    return row.sequence.request.sampling.n if row.num_output_tokens == 0 else 1


def _alternatives(scores: Tensor, tokens: Tensor, rows: list[TokenRow]) -> list[Tensor]:
    num_top = num_alternatives([row.params.logprobs for row in rows], scores.shape[1])
    return [] if num_top is None else list(token_logprobs(scores, tokens, num_top))
