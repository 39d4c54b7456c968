"""DoLa: how far earlier layers are from the last one, the difference to one, and its token.

Everything happens in log space in float32. Knows nothing of layers or requests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from multiexit_engine.ops.registry import register_op
from multiexit_engine.ops.tokens import drawn_tokens


@register_op
def js_divergences(mature: Tensor, premature: Tensor, form: str) -> Tensor:
    """How much each premature distribution differs from the mature one.

    With P, Q the softmaxes of mature and premature logits and M their mean:

    * "exact": ``(KL(P || M) + KL(Q || M)) / 2``, the Jensen-Shannon divergence in nats, at most
      log 2;
    * "reference": ``(KL(M || P) + KL(M || Q)) / 2``, divided by the size of the vocabulary.

    A token that both rule out (-inf) adds nothing. Sums run in float64, so that their order, and
    with it the number of rows or threads, does not show.

    Args:
        mature: [rows, vocab] logits, any float dtype.
        premature: [candidates, rows, vocab] logits, same device.
        form: "exact" or "reference".

    Returns:
        [candidates, rows] float32 (float64 if an input is).

    Source: Chuang et al. 2023, arXiv:2309.03883, eq. 3, for "exact"; for "reference"
        ``_dola_select_contrast`` of transformers 4.55, which gives ``F.kl_div`` its arguments the
        other way round and averages over the vocabulary.
    """
    log_p = _log_softmax(mature, premature)
    divergences = [_divergence(log_p, _log_softmax(layer, mature), form) for layer in premature]
    return torch.stack(divergences).to(log_p.dtype)


@register_op
def relative_top_logits(mature: Tensor, premature: Tensor, relative_top: Tensor) -> Tensor:
    """``log p - log q`` of the tokens that the mature head finds plausible, -inf for all others.

    Plausible is ``log p >= max log p + log relative_top``. Never gives NaN: a plausible token that
    the premature head rules out (-inf) scores 1e38 and more.

    Args:
        mature: [rows, vocab] logits, any float dtype; p is their softmax.
        premature: [rows, vocab] logits, same device; q is their softmax.
        relative_top: [rows] float32 thresholds in [0, 1].

    Returns:
        [rows, vocab] float32 (float64 if an input is), not normalised.

    Source: Chuang et al. 2023, arXiv:2309.03883, eq. 4; ``_relative_top_filter`` of
        transformers 4.55.
    """
    log_p, log_q = _log_softmax(mature, premature), _log_softmax(premature, mature)
    least = torch.finfo(log_p.dtype).min
    threshold = log_p.amax(-1) + relative_top.to(log_p.dtype).log()
    # No threshold lies below the least finite number, so -inf never passes.
    plausible = log_p >= threshold.clamp(min=least)[:, None]
    return torch.where(plausible, log_p - log_q.clamp(min=least), -math.inf)


@register_op
def dola_tokens(
    mature: Tensor,
    premature: Tensor,
    relative_top: Tensor,
    form: str,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    places: Tensor,
) -> tuple[Tensor, Tensor]:
    """Choose a token for each row from its difference to the candidate that differs most from it.

    The scores are those of ``relative_top_logits``, the choice is that of ``head_tokens``. Of
    candidates that differ equally much the first is taken; a single one is not compared.

    Args:
        mature: [rows, vocab] logits, any float dtype; p is their softmax.
        premature: [candidates, rows, vocab] logits, same device.
        relative_top: [rows] float32 thresholds in [0, 1].
        form: of ``js_divergences``.
        temperature: [rows] float32; 0 is greedy.
        seeds: [rows] int64, see ``gumbel_noise``; not looked at in greedy rows.
        positions: [rows] int64, see ``gumbel_noise``.
        places: [rows] int64, contiguous, that is overwritten with each row's place among the
            candidates.

    Returns:
        [rows] int64 tokens and [rows] float32 their log-probabilities under the softmax of the
        scores, without the temperature; NaN where a row's numbers are no numbers (float64 if an
        input is).

    Source: Chuang et al. 2023, arXiv:2309.03883, eqs. 2-4; Maddison et al. 2014, arXiv:1411.0030,
        for the choice.
    """
    places.zero_()
    if len(premature) > 1:
        places.copy_(js_divergences(mature, premature, form).argmax(0))
    base = premature[places, torch.arange(len(places), device=places.device)]
    scores = relative_top_logits(mature, base, relative_top)
    return drawn_tokens(scores.log_softmax(-1), temperature, seeds, positions)


def _is_single(mature: Tensor, premature: Tensor, *_: object, **__: object) -> bool:
    return torch.float64 not in (mature.dtype, premature.dtype)


js_divergences.backend(
    "triton",
    "multiexit_engine.kernels.dola:js_divergences",
    device="cuda",
    supports=_is_single,
)
dola_tokens.backend(
    "triton",
    "multiexit_engine.kernels.dola:dola_tokens",
    device="cuda",
    supports=_is_single,
)
js_divergences.backend(
    "cpu", "multiexit_engine._native:js_divergences", device="cpu", supports=_is_single
)
dola_tokens.backend(
    "cpu", "multiexit_engine._native:dola_tokens", device="cpu", supports=_is_single
)


def _log_softmax(logits: Tensor, other: Tensor) -> Tensor:
    """Log-probabilities in the dtype that both tensors share; +inf counts as the largest number."""
    dtype = torch.promote_types(torch.promote_types(logits.dtype, other.dtype), torch.float32)
    return logits.to(dtype).clamp(max=torch.finfo(dtype).max).log_softmax(-1)


def _divergence(log_p: Tensor, log_q: Tensor, form: str) -> Tensor:
    """[rows] float64."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    if form == "reference":
        total = _kl(log_m, log_p) + _kl(log_m, log_q)
        return 0.5 * total / log_p.shape[-1]
    return 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p.isneginf(), 0.0, terms).sum(-1, dtype=torch.float64)
