"""From the hidden states at the tapped layers to one score row, or one token, per logit row.

Follows an exit plan; knows nothing of requests, of the sampler, or of how hidden states came to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.decoding.dola import dola_scores
from multiexit_engine.decoding.plan import ContrastFunction, ExitPlan, HeadGroup
from multiexit_engine.layers.exit_heads import ExitHeads
from multiexit_engine.ops import (
    contrast_heads,
    contrast_logits,
    contrast_tokens,
    head_logits,
    head_tokens,
)
from multiexit_engine.params import Contrast, DecodingMode, DoLa


class Draws(NamedTuple):
    """How the token of each row is drawn.

    Attributes:
        temperature: [rows] float32; 0 is greedy.
        seeds: [rows] int64.
        positions: [rows] int64, see ``gumbel_noise``.
    """

    temperature: Tensor
    seeds: Tensor
    positions: Tensor


def mode_scores(
    plan: ExitPlan, taps: Mapping[int, Tensor], heads: ExitHeads
) -> tuple[Tensor, dict[int, str]]:
    """The distribution of every logit row in its own mode.

    Exact up to rounding; a row's scores do not depend on the other rows' modes.

    Args:
        plan: the heads of each row.
        taps: for each layer of ``plan.rows_at`` the raw block outputs [rows kept there,
            hidden_size], in the order of ``plan.rows_at``.
        heads: gives normalised hidden states and weights.

    Returns:
        [rows, vocab] float32: logits of a single head, normalised log-probabilities of a contrast,
        under DoLa differences of log-probabilities (-inf for tokens that it rules out), or what a
        custom function gives; and for each row whose custom function failed the message. The
        scores of such a row are zeros.

    Source: ``MultiExitMixin.forward`` of IBM's autocontrastive-gen, at every position.
    """
    failures: dict[int, str] = {}
    parts = [_group_scores(group, plan, taps, heads, failures) for group in plan.groups]
    if len(parts) == 1:
        return parts[0], failures
    scores = parts[0].new_empty(plan.num_rows, parts[0].shape[1])
    for group, part in zip(plan.groups, parts, strict=True):
        scores[_index(group.rows, scores.device)] = part
    return scores, failures


def gives_tokens(mode: DecodingMode, heads: ExitHeads) -> bool:
    """Whether ``mode_tokens`` knows this mode."""
    if isinstance(mode, DoLa):
        return False
    if not isinstance(mode, Contrast):
        return True
    return mode.function is None and mode.min_candidates == 1 and not heads.has_bias


def mode_tokens(
    plan: ExitPlan, taps: Mapping[int, Tensor], heads: ExitHeads, draws: Draws
) -> tuple[Tensor, Tensor]:
    """A token of every logit row, from its mode's distribution; no scores are kept.

    Args:
        plan: the heads of each row; only modes of which ``gives_tokens`` is true.
        taps: as in ``mode_scores``.
        heads: gives normalised hidden states and weights.
        draws: how each row's token is drawn.

    Returns:
        [rows] int64 tokens and [rows] float32 their log-probabilities.

    Source: as ``mode_scores``, then the ops ``head_tokens`` and ``contrast_tokens``.
    """
    parts = [_group_tokens(group, plan, taps, heads, draws) for group in plan.groups]
    if len(parts) == 1:
        return parts[0]
    tokens, logprobs = (part.new_empty(plan.num_rows) for part in parts[0])
    for group, (own_tokens, own_logprobs) in zip(plan.groups, parts, strict=True):
        index = _index(group.rows, tokens.device)
        tokens[index], logprobs[index] = own_tokens, own_logprobs
    return tokens, logprobs


def _group_tokens(
    group: HeadGroup,
    plan: ExitPlan,
    taps: Mapping[int, Tensor],
    heads: ExitHeads,
    draws: Draws,
) -> tuple[Tensor, Tensor]:
    if len(group.rows) < plan.num_rows:
        index = _index(group.rows, draws.seeds.device)
        draws = Draws(*(column[index] for column in draws))
    upper = heads.operands(group.upper, _hidden(group, group.upper.layer, plan, taps))
    if group.lower is None:
        return head_tokens(*upper, *draws)
    lower = heads.operands(group.lower, _hidden(group, group.lower.layer, plan, taps))
    alpha = torch.tensor(group.alphas, dtype=torch.float32).to(
        upper.hidden.device, non_blocking=True
    )
    return contrast_tokens(upper.hidden, upper.weight, lower.hidden, lower.weight, alpha, *draws)


def _group_scores(
    group: HeadGroup,
    plan: ExitPlan,
    taps: Mapping[int, Tensor],
    heads: ExitHeads,
    failures: dict[int, str],
) -> Tensor:
    upper = heads.operands(group.upper, _hidden(group, group.upper.layer, plan, taps))
    if group.candidates:
        candidates = [
            heads.operands(head, _hidden(group, head.layer, plan, taps))
            for head in group.candidates
        ]
        return dola_scores(upper, candidates, group.alphas, group.jsd)
    if group.lower is None:
        return head_logits(*upper)
    lower = heads.operands(group.lower, _hidden(group, group.lower.layer, plan, taps))
    if group.function is not None:
        return _custom_scores(group, head_logits(*upper), head_logits(*lower), failures)
    device = upper.hidden.device
    alpha = torch.tensor(group.alphas, dtype=torch.float32).to(device, non_blocking=True)
    least = None
    if any(count != 1 for count in group.min_candidates):
        least = torch.tensor(group.min_candidates).to(device, non_blocking=True)
    if upper.bias is None and lower.bias is None:
        return contrast_heads(upper.hidden, upper.weight, lower.hidden, lower.weight, alpha, least)
    return contrast_logits(head_logits(*upper), head_logits(*lower), alpha, least)


def _hidden(group: HeadGroup, layer: int, plan: ExitPlan, taps: Mapping[int, Tensor]) -> Tensor:
    kept = plan.rows_at[layer]
    if kept == group.rows:
        return taps[layer]
    places = {row: place for place, row in enumerate(kept)}
    chosen = tuple(places[row] for row in group.rows)
    return taps[layer][_index(chosen, taps[layer].device)]


def _index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(rows).to(device, non_blocking=True)


def _custom_scores(
    group: HeadGroup, upper: Tensor, lower: Tensor, failures: dict[int, str]
) -> Tensor:
    assert group.function is not None
    scores = torch.zeros_like(upper)
    for place, row in enumerate(group.rows):
        pair = upper[None, place : place + 1], lower[None, place : place + 1]
        result = _call(group.function, *pair)
        if isinstance(result, str):
            failures[row] = result
        else:
            scores[place] = result[0, 0]
    return scores


def _call(function: ContrastFunction, upper: Tensor, lower: Tensor) -> Tensor | str:
    """The function's scores, or why there are none. It gets copies: it may write into them."""
    shape = list(upper.shape)
    try:
        result = function(upper.clone(), lower.clone())
    except Exception as error:  # a request's own code: any failure is that request's alone
        return f"the contrast function raised {type(error).__name__}: {error}"
    if not isinstance(result, Tensor):
        return f"the contrast function returned {type(result).__name__}, not a tensor {shape}"
    if list(result.shape) != shape:
        return f"the contrast function returned shape {list(result.shape)}, not {shape}"
    if result.is_complex():
        return f"the contrast function returned {result.dtype}, not real numbers"
    return result
