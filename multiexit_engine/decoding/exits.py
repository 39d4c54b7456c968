"""From the hidden states at the tapped layers to one score row per logit row.

Follows an exit plan; knows nothing of requests, of the sampler, or of how hidden states came to be.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from multiexit_engine.decoding.plan import ContrastFunction, ExitPlan, HeadGroup
from multiexit_engine.layers.exit_heads import ExitHeads
from multiexit_engine.ops import contrast_heads, contrast_logits, head_logits


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
        or what a custom function gives; and for each row whose custom function failed the message.
        The scores of such a row are zeros.

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


def _group_scores(
    group: HeadGroup,
    plan: ExitPlan,
    taps: Mapping[int, Tensor],
    heads: ExitHeads,
    failures: dict[int, str],
) -> Tensor:
    upper = heads.operands(group.upper, _hidden(group, group.upper.layer, plan, taps))
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
