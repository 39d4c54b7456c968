"""From the hidden states at the tapped layers to one score row, or one token, per logit row.

Follows an exit plan; knows nothing of requests, of the sampler, or of how hidden states came to be.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from multiexit_engine.decoding.custom_contrast import custom_scores
from multiexit_engine.decoding.dola import dola_scores, tokens_of_differences
from multiexit_engine.decoding.draws import Draws, pair_tokens, shared_tokens, tokens_in_order
from multiexit_engine.decoding.plan import ExitPlan, HeadGroup
from multiexit_engine.layers.exit_heads import ExitHeads, Head, HeadOperands
from multiexit_engine.layers.rough_heads import HeadRows
from multiexit_engine.ops import (
    contrast_heads,
    contrast_logits,
    device_kind,
    head_logits,
    head_tokens,
)
from multiexit_engine.ops.best_tokens import BestTokens
from multiexit_engine.ops.edits import TokenEdits
from multiexit_engine.ops.tokens import RowGroup
from multiexit_engine.params import Contrast, DecodingMode
from multiexit_engine.transfer import to_device

# the edits of some rows of a plan
EditsOf: TypeAlias = Callable[[Sequence[int]], TokenEdits]


def mode_scores(
    plan: ExitPlan,
    taps: Mapping[int, Tensor],
    heads: ExitHeads,
    allowed: Sequence[Tensor | None] = (),
    num_candidates: Tensor | None = None,
    premature_layers: Tensor | None = None,
) -> tuple[Tensor, dict[int, str]]:
    """The distribution of every logit row in its own mode.

    Exact up to rounding; a row's scores do not depend on the other rows' modes.

    Args:
        plan: the heads of each row.
        taps: for each layer of ``plan.rows_at`` the raw block outputs [rows kept there,
            hidden_size], in the order of ``plan.rows_at``.
        heads: gives normalised hidden states and weights.
        allowed: for each row [vocab] bool, or None, the tokens that may be chosen, or nothing at
            all. Only DoLa looks at it: what it rules out depends on the best token.
        num_candidates: [rows] int32 that takes the sizes of the plausible sets of contrasts; other
            rows are left as they are. None: nobody wants to know.
        premature_layers: [rows] int64 that takes the layers which DoLa contrasts with, likewise.

    Returns:
        [rows, vocab] float32: logits of a single head, normalised log-probabilities of a contrast,
        under DoLa differences of log-probabilities (-inf for tokens that it rules out), or what a
        custom function gives; and for each row whose custom function failed the message. The
        scores of such a row are zeros.

    Source: ``MultiExitMixin.forward`` of IBM's autocontrastive-gen, at every position.
    """
    failures: dict[int, str] = {}
    parts = [
        _group_scores(group, plan, taps, heads, allowed, failures, num_candidates, premature_layers)
        for group in plan.groups
    ]
    if len(parts) == 1:
        return parts[0], failures
    scores = parts[0].new_empty(plan.num_rows, parts[0].shape[1])
    for group, part in zip(plan.groups, parts, strict=True):
        scores[_index(group.rows, scores.device)] = part
    return scores, failures


def gives_tokens(mode: DecodingMode) -> bool:
    """Whether ``mode_tokens`` knows this mode."""
    return not (isinstance(mode, Contrast) and mode.function)


def mode_tokens(
    plan: ExitPlan,
    taps: Mapping[int, Tensor],
    heads: ExitHeads,
    draws: Draws,
    num_candidates: Tensor | None = None,
    edits_of: EditsOf | None = None,
    best: BestTokens | None = None,
    premature_layers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A token of every logit row, from its mode's distribution; no scores are kept.

    Rows whose heads have one matrix are chosen together, so that it is read once.

    Args:
        plan: the heads of each row; only modes of which ``gives_tokens`` is true.
        taps: as in ``mode_scores``.
        heads: gives normalised hidden states and weights.
        draws: how each row's token is drawn.
        num_candidates: as in ``mode_scores``.
        edits_of: gives what is done to the scores of the rows that it is given, in their order,
            before their tokens are chosen; None: nothing is done to any. Rows of ``DoLa`` have
            neither edits nor narrowed draws.
        best: takes the best tokens of rows that ask for them, none of ``DoLa``; None: nobody does.
        premature_layers: as in ``mode_scores``.

    Returns:
        [rows] int64 tokens, and [rows] float32: NaN where a row's numbers are no numbers, -inf
        where edits leave no token, else its token's log-probability before any edit or, where that
        was not computed, 0.

    Source: as ``mode_scores``, then the ops ``head_tokens``, ``contrast_tokens``, ``dola_tokens``.
    """
    order: list[int] = []
    parts: list[tuple[Tensor, Tensor]] = []
    for group in plan.groups:
        if group.candidates:
            parts.append(_dola_tokens(group, plan, taps, heads, draws, premature_layers))
            order += group.rows
    for shared in _by_weight(plan, taps, heads):
        rows = [row for groups, _ in shared for group in groups for row in group.rows]
        own, counts, told, index = draws, num_candidates, best, None
        if rows != list(range(plan.num_rows)):
            index = _index(rows, draws.seeds.device)
            own = draws.rows(index)
            counts = None if num_candidates is None else num_candidates[index]
            told = best and best.rows(index)
        edits = None if edits_of is None else edits_of(rows)
        parts.append(_chosen_together(shared, plan, taps, heads, own, counts, edits, told))
        if num_candidates is not None and counts is not None and index is not None:
            num_candidates[index] = counts
        if best is not None and told is not None and index is not None:
            best.put(index, told)
        order += rows
    tokens, logprobs = (
        torch.cat(column) if len(column) > 1 else column[0] for column in zip(*parts, strict=True)
    )
    if order == list(range(plan.num_rows)):
        return tokens, logprobs
    places = _index(_places(range(plan.num_rows), order), tokens.device)
    return tokens[places], logprobs[places]


def no_candidates(plan: ExitPlan, device: torch.device) -> Tensor | None:
    """[rows] int32 zeros to take the sizes of plausible sets; None where no row has one."""
    if not any(group.has_plausible_set for group in plan.groups):
        return None
    return torch.zeros(plan.num_rows, dtype=torch.int32, device=device)


def no_premature_layers(plan: ExitPlan, device: torch.device) -> Tensor | None:
    """[rows] int64 of -1 to take the layers that DoLa contrasts with; None where no row does."""
    if not any(group.candidates for group in plan.groups):
        return None
    return torch.full((plan.num_rows,), -1, device=device)


def draft_tokens(
    head: Head, tap: Tensor, heads: ExitHeads, draws: Draws, num_tokens: int
) -> Tensor:
    """[rows] int64: as ``mode_tokens`` of one exit, from the first tokens of the vocabulary only.

    Args:
        head: of the exit.
        tap: [rows, hidden_size] raw block outputs at its layer.
        heads: gives normalised hidden states and weights.
        draws: how each row's token is drawn.
        num_tokens: how many tokens of the vocabulary are looked at.

    Source: Zhao et al. 2025, arXiv:2502.14856, with the vocabulary's own order in place of counts.
    """
    operands = heads.operands(head, tap)
    if device_kind(tap.device) == "cpu" and heads.rough.codes(operands.weight) is not None:
        rows = HeadRows(operands.hidden, [RowGroup(len(tap))], draws.temperature, *draws.columns)
        found = heads.rough.tokens(rows, operands.weight, operands.bias, num_tokens)
        if found is not None:
            return found[0]
    return head_tokens(*operands.first(num_tokens), *draws.columns)[0]


def draft_choices(
    head: Head, tap: Tensor, heads: ExitHeads, draws: Draws, num_tokens: int, count: int
) -> Tensor:
    """[rows, count] int64: the token of ``draft_tokens``, then that without the ones before.

    Args:
        head: as in ``draft_tokens``, like what follows.
        tap: as there.
        heads: as there.
        draws: as there; nothing narrows them.
        num_tokens: as there.
        count: how many tokens.
    """
    logits = head_logits(*heads.operands(head, tap).first(num_tokens))
    return tokens_in_order(logits, draws, count)


_Sharing: TypeAlias = list[tuple[list[HeadGroup], HeadOperands]]


def _by_weight(
    plan: ExitPlan, taps: Mapping[int, Tensor], heads: ExitHeads
) -> Collection[_Sharing]:
    """Groups but DoLa's: those of each upper head, its operands; heads with one matrix together."""
    by_head: dict[Head, list[HeadGroup]] = {}
    for group in plan.groups:
        if not group.candidates:
            by_head.setdefault(group.upper, []).append(group)
    sharing: dict[tuple[int, int], _Sharing] = {}
    for head, groups in by_head.items():
        rows = tuple(row for group in groups for row in group.rows)
        upper = heads.operands(head, _hidden(rows, head.layer, plan, taps))
        sharing.setdefault((id(upper.weight), id(upper.bias)), []).append((groups, upper))
    return sharing.values()


def _chosen_together(
    shared: _Sharing,
    plan: ExitPlan,
    taps: Mapping[int, Tensor],
    heads: ExitHeads,
    draws: Draws,
    num_candidates: Tensor | None,
    edits: TokenEdits | None,
    best: BestTokens | None,
) -> tuple[Tensor, Tensor]:
    """Tokens of the rows of heads with one matrix, in the order in which these list them."""
    groups = [group for own, _ in shared for group in own]
    uppers = [upper for _, upper in shared]
    hidden = torch.cat([u.hidden for u in uppers]) if len(uppers) > 1 else uppers[0].hidden
    upper = uppers[0]._replace(hidden=hidden)
    is_token_all = edits is None and best is None
    is_unchanged = is_token_all and draws.narrowing is None
    is_plain = is_token_all and all(group.lower is None for group in groups)
    is_rough = is_unchanged and device_kind(hidden.device) == "cpu"
    if is_plain and is_rough:
        is_rough = heads.rough.codes(upper.weight) is not None
    if is_plain and not is_rough:
        return pair_tokens(upper, None, None, draws, None)
    lowers = [_lower_operands(group, plan, taps, heads) for group in groups]
    device = hidden.device
    alphas = [group.alphas or (1.0,) * len(group.rows) for group in groups]
    alpha = to_device(list(chain(*alphas)), device, torch.float32)
    least = _least_candidates(groups, device)
    parts = [
        RowGroup(len(group.rows), *(lower or ()))
        for group, lower in zip(groups, lowers, strict=True)
    ]
    if is_rough and least is None:
        rows = HeadRows(hidden, parts, alpha, *draws.columns, num_candidates)
        found = heads.rough.tokens(rows, upper.weight, upper.bias)
        if found is not None:
            return found
    if is_plain:
        return pair_tokens(upper, None, None, draws, None)
    lower = lowers[0]
    is_pair = lower is not None and len(groups) == 1 and least is None and is_token_all
    if is_pair and lower and upper.bias is None and lower.bias is None:
        return pair_tokens(upper, lower, alpha, draws, num_candidates)
    return shared_tokens(upper, parts, alpha, least, draws, num_candidates, edits, best)


def _dola_tokens(
    group: HeadGroup,
    plan: ExitPlan,
    taps: Mapping[int, Tensor],
    heads: ExitHeads,
    draws: Draws,
    premature_layers: Tensor | None,
) -> tuple[Tensor, Tensor]:
    upper = heads.operands(group.upper, _hidden(group.rows, group.upper.layer, plan, taps))
    candidates = _candidates(group, plan, taps, heads)
    own = draws
    if group.rows != tuple(range(plan.num_rows)):
        own = draws.rows(_index(group.rows, draws.seeds.device))
    places = torch.empty_like(own.seeds)
    chosen = tokens_of_differences(upper, candidates, group.alphas, group.jsd, own, places)
    _tell_layers(group, places, premature_layers)
    return chosen


def _candidates(
    group: HeadGroup, plan: ExitPlan, taps: Mapping[int, Tensor], heads: ExitHeads
) -> list[HeadOperands]:
    """Of a group of ``DoLa``."""
    return [
        heads.operands(head, _hidden(group.rows, head.layer, plan, taps))
        for head in group.candidates
    ]


def _tell_layers(group: HeadGroup, places: Tensor, premature_layers: Tensor | None) -> None:
    """Note the layers of a group's rows, given by their places among its candidates."""
    if premature_layers is not None:
        layers = _index([head.layer for head in group.candidates], places.device)
        premature_layers[_index(group.rows, places.device)] = layers[places]


def _lower_operands(
    group: HeadGroup, plan: ExitPlan, taps: Mapping[int, Tensor], heads: ExitHeads
) -> HeadOperands | None:
    if group.lower is None:
        return None
    return heads.operands(group.lower, _hidden(group.rows, group.lower.layer, plan, taps))


def _least_candidates(groups: Sequence[HeadGroup], device: torch.device) -> Tensor | None:
    """[rows] int64: least sizes of plausible sets, 1 without contrast; None where all are 1."""
    counts = [n for group in groups for n in group.min_candidates or (1,) * len(group.rows)]
    if all(count == 1 for count in counts):
        return None
    return to_device(counts, device)


def _group_scores(
    group: HeadGroup,
    plan: ExitPlan,
    taps: Mapping[int, Tensor],
    heads: ExitHeads,
    allowed: Sequence[Tensor | None],
    failures: dict[int, str],
    num_candidates: Tensor | None,
    premature_layers: Tensor | None,
) -> Tensor:
    upper = heads.operands(group.upper, _hidden(group.rows, group.upper.layer, plan, taps))
    if group.candidates:
        candidates = _candidates(group, plan, taps, heads)
        own = [allowed[row] for row in group.rows] if allowed else []
        places = torch.empty(len(group.rows), dtype=torch.int64, device=upper.hidden.device)
        scores = dola_scores(upper, candidates, group.alphas, group.jsd, own, places)
        _tell_layers(group, places, premature_layers)
        return scores
    lower = _lower_operands(group, plan, taps, heads)
    if lower is None:
        return head_logits(*upper)
    if group.function is not None:
        scores, failed = custom_scores(group.function, head_logits(*upper), head_logits(*lower))
        failures.update({group.rows[place]: why for place, why in failed.items()})
        return scores
    device = upper.hidden.device
    alpha = to_device(group.alphas, device, torch.float32)
    least = _least_candidates([group], device)
    counts = None if num_candidates is None else num_candidates.new_empty(len(group.rows))
    if upper.bias is None and lower.bias is None:
        scores = contrast_heads(
            upper.hidden, upper.weight, lower.hidden, lower.weight, alpha, least, counts
        )
    else:
        scores = contrast_logits(head_logits(*upper), head_logits(*lower), alpha, least, counts)
    if num_candidates is not None and counts is not None:
        num_candidates[_index(group.rows, device)] = counts
    return scores


def _hidden(
    rows: tuple[int, ...], layer: int, plan: ExitPlan, taps: Mapping[int, Tensor]
) -> Tensor:
    kept = plan.rows_at[layer]
    if kept == rows:
        return taps[layer]
    # see Flight._rows
    return taps[layer].index_select(0, _index(_places(rows, kept), taps[layer].device))


def _places(rows: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
    """Where ``rows`` stand among ``kept``."""
    places = {row: place for place, row in enumerate(kept)}
    return tuple(places[row] for row in rows)


def _index(rows: Sequence[int], device: torch.device) -> Tensor:
    return to_device(rows, device)
