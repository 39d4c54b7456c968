"""The best tokens of heads, found by 8-bit codes first where that is faster; exact all the same.

Knows heads by their weights only; nothing of layers, modes or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.ops import (
    CodedHead,
    HeadSpread,
    LogitErrors,
    RoughSums,
    are_codes_fast,
    code_head,
    code_states,
    coded_head_tokens,
    finer_head,
    finer_spread,
    head_spread,
    head_tokens,
    logit_bounds,
    logit_errors,
    rough_head_sums,
    shared_head_tokens,
)
from multiexit_engine.ops.tokens import RowGroup
from multiexit_engine.quantization import Weight
from multiexit_engine.transfer import to_host

# of a head with fewer numbers the exact logits cost as little, since it stays in the cache
LEAST_NUMBERS = 1 << 21
# calls in a row that codes may leave open before they are given up
PATIENCE = 8
# Codes cost a byte where the head has more, and something besides: they have to spare it more often
# than that.
BESIDE_CODES = 0.05
CALLS_BETWEEN_TRIALS = 16
# Of so many rows both terms are multiplied while the head's codes come from memory; of more the
# second one doubles the time.
FEW_ROWS = 6
# The same of tests, which ask no exact logits of most tokens.
FEW_TESTED = 12
CODED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HeadRows:
    """Rows that share a head, and how their tokens are chosen: see ``shared_head_tokens``.

    Attributes:
        hidden: [rows, hidden_size].
        groups: the rows in order.
        alpha: [rows] float32.
        temperature: [rows] float32; 0 is greedy.
        seeds: [rows] int64.
        positions: [rows] int64.
        num_candidates: [rows] int32 that is overwritten, or None.
    """

    hidden: Tensor
    groups: Sequence[RowGroup]
    alpha: Tensor
    temperature: Tensor
    seeds: Tensor
    positions: Tensor
    num_candidates: Tensor | None = None

    @property
    def is_contrasted(self) -> bool:
        """Whether a row is."""
        return any(group.lower_weight is not None for group in self.groups)

    def some(self, places: list[int]) -> HeadRows:
        """Those rows, in ascending order; what is counted of them is not counted here."""
        index = torch.tensor(places)
        counts = None if self.num_candidates is None else self.num_candidates[index]
        groups, start = [], 0
        for group in self.groups:
            stop = start + group.num_rows
            own = [place - start for place in places if start <= place < stop]
            lower = None if group.lower_hidden is None else group.lower_hidden[own]
            groups.append(group._replace(num_rows=len(own), lower_hidden=lower))
            start = stop
        columns = (self.alpha, self.temperature, self.seeds, self.positions)
        found = HeadRows(
            self.hidden[index],
            [group for group in groups if group.num_rows],
            *(column[index] for column in columns),
        )
        return replace(found, num_candidates=counts)


class RoughReading(NamedTuple):
    """What codes say of rows.

    Attributes:
        found: of the rough logits, with exact ones of the tokens that count most.
        errors: how far the rough ones may be off.
    """

    found: RoughSums
    errors: LogitErrors


class _Trial:
    """Whether codes keep sparing tests the head; asked again now and then where they do not."""

    def __init__(self, bytes_per_number: int) -> None:
        self._least_share = 1 / bytes_per_number + BESIDE_CODES
        self._share = 1.0
        self._num_refused = 0

    @property
    def pays(self) -> bool:
        if self._share >= self._least_share:
            return True
        self._num_refused += 1
        return self._num_refused % CALLS_BETWEEN_TRIALS == 0

    def note(self, is_spared: bool) -> None:
        self._share += (is_spared - self._share) / CALLS_BETWEEN_TRIALS


@dataclass(eq=False)
class _Rough:
    """A weight, which keeps its id, with its codes and the latest calls that they left open.

    Contrasts are counted apart: they need more than the best token.
    """

    weight: Weight
    head: CodedHead | None
    # the first tokens of the head and of its bias, by their number
    shortlists: dict[int, tuple[CodedHead, Tensor | None]] = field(default_factory=dict)
    # by the number of tokens, None for all
    trials: dict[int | None, _Trial] = field(default_factory=dict)
    num_open: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})

    @cached_property
    def spread(self) -> HeadSpread:
        """Of the codes; found at the first test."""
        assert isinstance(self.weight, Tensor) and self.head is not None, "tests ask codes"
        return head_spread(self.weight, self.head)

    @cached_property
    def finer(self) -> CodedHead:
        """Codes of what the codes lack; made when these first leave a test open."""
        assert isinstance(self.weight, Tensor) and self.head is not None, "tests ask codes"
        return finer_head(self.weight, self.head)

    @cached_property
    def finer_spread(self) -> HeadSpread:
        """Of both codes together; PyTorch's threads would wake to find it for each test."""
        return finer_spread(self.spread, self.finer)


class RoughHeads:
    """The codes of heads, made when they are first asked for: a byte for each of their numbers."""

    def __init__(self) -> None:
        self._found: dict[int, _Rough] = {}

    def codes(self, weight: Weight, *, for_contrast: bool = False) -> CodedHead | None:
        """Of a [vocab, hidden] head; None where its exact logits are the faster way."""
        known = self._found.get(id(weight))
        if known is not None and known.head is None:
            return None
        # asked each time: a backend can be chosen for one call
        if not are_codes_fast():
            return None
        rough = self._rough(weight)
        return None if rough.num_open[for_contrast] >= PATIENCE else rough.head

    def best_tokens(
        self, hidden: Tensor, weight: Weight, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The tokens that ``head_tokens`` gives greedy rows, and less of their log-probabilities.

        Args:
            hidden: [rows, hidden_size].
            weight: [vocab, hidden_size] of the same dtype, or quantized; the same object each time.
            bias: [vocab] or None.

        Returns:
            [rows] int64, and [rows] float32: NaN where a row's numbers are no numbers, else 0 or
            the token's log-probability.
        """
        nothing = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        number = nothing.float()
        rows = HeadRows(hidden, [RowGroup(len(hidden))], number, number, nothing, nothing)
        found = self.tokens(rows, weight, bias)
        return exact_best_tokens(hidden, weight, bias) if found is None else found

    def statistics(
        self,
        hidden: Tensor,
        weight: Weight,
        bias: Tensor | None,
        shortlist: int | None = None,
        *,
        num_terms: int | None = None,
        is_fine: bool = False,
    ) -> RoughReading | None:
        """What codes say of distributions; None where exact logits are the faster way.

        Args:
            hidden: [rows, hidden_size].
            weight: as in ``best_tokens``.
            bias: as in ``best_tokens``.
            shortlist: only the first so many tokens count; None: all.
            num_terms: of the states; None for two, the finer ones, where they cost no more.
            is_fine: whether codes of what the head's codes lack are read, too, as many bytes again.
        """
        head = self.codes(weight)
        if head is None or not self._trial(weight, shortlist).pays:
            return None
        rough, finer = self._rough(weight), None
        if shortlist is not None:
            if shortlist * hidden.shape[1] < LEAST_NUMBERS:
                return None
            head, bias = self._shortlisted(weight, bias, head, shortlist)
        if num_terms is None:
            num_terms = 2 if len(hidden) <= FEW_ROWS else 1
        assert isinstance(weight, Tensor), "quantized heads have no codes"
        states, spread = code_states(hidden, head, num_terms), rough.spread
        if is_fine:
            finer, spread = rough.finer, rough.finer_spread
        bounds = logit_bounds(states, finer or head, bias)
        found = rough_head_sums(hidden, weight, bias, states, head, bounds, finer)
        return RoughReading(found, logit_errors(states, finer or head, bias, spread))

    def note_test(self, weight: Weight, shortlist: int | None, *, is_spared: bool) -> None:
        """Tell whether ``statistics`` spared a test the reading of the head."""
        self._trial(weight, shortlist).note(is_spared)

    def _trial(self, weight: Weight, shortlist: int | None) -> _Trial:
        assert isinstance(weight, Tensor), "quantized heads have no codes"
        trial = _Trial(weight.element_size())
        return self._rough(weight).trials.setdefault(shortlist, trial)

    def _shortlisted(
        self, weight: Weight, bias: Tensor | None, head: CodedHead, num_tokens: int
    ) -> tuple[CodedHead, Tensor | None]:
        # kept, since the greatest numbers of both are found once
        kept = self._rough(weight).shortlists
        if num_tokens not in kept:
            first = replace(head, vocab=num_tokens, errors=head.errors[:num_tokens])
            kept[num_tokens] = first, None if bias is None else bias[:num_tokens]
        return kept[num_tokens]

    def tokens(
        self,
        rows: HeadRows,
        weight: Weight,
        bias: Tensor | None,
        num_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """As ``best_tokens`` of any rows; None where codes are of no use to all of them.

        Args:
            rows: whose tokens are wanted.
            weight: as in ``best_tokens``.
            bias: as in ``best_tokens``.
            num_tokens: only the first so many tokens of the vocabulary are looked at; None: all.
        """
        head = self.codes(weight, for_contrast=rows.is_contrasted)
        if head is None or not _are_known(rows):
            return None
        rough = self._rough(weight)
        assert isinstance(weight, Tensor), "quantized heads have no codes"
        if num_tokens is not None:
            if num_tokens * weight.shape[1] < LEAST_NUMBERS:
                return None
            head, weight = replace(head, vocab=num_tokens), weight[:num_tokens]
            bias = None if bias is None else bias[:num_tokens]
        is_many = len(rows.hidden) > FEW_ROWS and not rows.is_contrasted
        tokens = _by_codes(rows, weight, bias, head, num_terms=1 if is_many else 2)
        places = _open_places(tokens)
        if places and is_many:
            left = rows.some(places)
            tokens[places] = _by_codes(left, weight, bias, head, num_terms=2)
            places = _open_places(tokens)
        log_probs = torch.zeros(len(tokens))
        if places:
            is_open = tokens < 0
            left = rows.some(places)
            tokens[is_open], log_probs[is_open] = shared_head_tokens(
                left.hidden,
                weight,
                bias,
                left.groups,
                left.alpha,
                None,
                left.temperature,
                left.seeds,
                left.positions,
                left.num_candidates,
            )
            if rows.num_candidates is not None and left.num_candidates is not None:
                rows.num_candidates[is_open] = left.num_candidates
        self._weigh(rough, rows.is_contrasted, 2 * len(places) > len(tokens))
        return tokens, log_probs

    def _rough(self, weight: Weight) -> _Rough:
        found = self._found.get(id(weight))
        if found is None:
            found = self._found[id(weight)] = _Rough(weight, _codes(weight))
        return found

    def _weigh(self, rough: _Rough, is_contrasted: bool, is_useless: bool) -> None:
        """Give up codes that keep leaving most rows open: such rows cost both ways."""
        rough.num_open[is_contrasted] = rough.num_open[is_contrasted] + 1 if is_useless else 0
        if all(count >= PATIENCE for count in rough.num_open.values()):
            rough.head = None


def exact_best_tokens(hidden: Tensor, weight: Weight, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """[rows] int64 and [rows]: the most likely token of each row, and its log-probability."""
    nothing = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    return head_tokens(hidden, weight, bias, nothing.float(), nothing, nothing)


def _by_codes(
    rows: HeadRows, weight: Tensor, bias: Tensor | None, head: CodedHead, *, num_terms: int
) -> Tensor:
    """[rows] int64 tokens; -1 where states in so many terms leave them open."""
    states = code_states(rows.hidden, head, num_terms=num_terms)
    choice = rows.groups, rows.alpha, rows.temperature, rows.seeds, rows.positions
    bounds = logit_bounds(states, head, bias)
    return coded_head_tokens(
        rows.hidden, weight, bias, *choice, states, head, bounds, rows.num_candidates
    )


def _open_places(tokens: Tensor) -> list[int]:
    (chosen,) = to_host([tokens])
    return [place for place, token in enumerate(chosen) if token < 0]


def _are_known(rows: HeadRows) -> bool:
    """Whether codes can tell the tokens: not where lower heads are quantized."""
    lowers = [group.lower_weight for group in rows.groups if group.lower_weight is not None]
    return all(isinstance(each, Tensor) and each.dtype in CODED_TYPES for each in lowers)


def _codes(weight: Weight) -> CodedHead | None:
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    is_worth_it = weight.dtype in CODED_TYPES and weight.numel() >= LEAST_NUMBERS
    return code_head(weight) if is_worth_it else None
