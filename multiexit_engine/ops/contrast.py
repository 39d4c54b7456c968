"""Auto-contrastive decoding: correct the logits of an upper exit by those of a lower one.

Everything happens in log space in float32: IBM's code works on probabilities in the logits' dtype
and gives NaN where a lower probability underflows. Knows nothing of layers or requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from multiexit_engine.ops.heads import head_logits
from multiexit_engine.ops.operands import is_plain, is_streamable
from multiexit_engine.ops.registry import register_op
from multiexit_engine.quantization import QuantizedWeight, Weight, dequantize

# Fetching a row of the lower head for one token of one row takes four times its share of the full
# product of one row; from four rows on the product is bound by arithmetic and grows with them
# (measured on one core of an AMD EPYC, [50257, 1024] float32: 2.0 us against 0.5 us).
SPARSE_SHARE = 0.25
# Rows of the lower head fetched at once: 1 MB at hidden size 1024, which stays in the L2 cache.
FETCHED_ROWS = 256


@register_op
def contrast_logits(
    upper: Tensor,
    lower: Tensor,
    alpha: Tensor,
    min_candidates: Tensor | None = None,
    num_candidates: Tensor | None = None,
) -> Tensor:
    """Contrast two exits inside the set of plausible tokens.

    With u, l the logits, m = min_candidates and u_(m) the m-th largest of u, the plausible set is
    ``C = {v: u_v >= min(max u + log alpha, u_(m))}``. Its tokens share their own mass in proportion
    to ``p_upper / p_lower``; all others keep ``p_upper``. The normaliser of the lower exit cancels.

    Never gives NaN: a plausible token with ``l = -inf`` takes the whole mass of C (several of them
    share it as p_upper does), one with ``l = +inf`` gets none unless all of C are so; ``u = -inf``
    stays -inf; ``u = +inf`` counts as the largest finite number.

    Args:
        upper: [rows, vocab] logits of the later exit, any float dtype.
        lower: [rows, vocab] logits of the earlier exit, same device.
        alpha: [rows] float32 plausibility thresholds relative to the most likely token; 1 and more
            keep only that token and its ties, 0 and less all tokens.
        min_candidates: [rows] int64, least sizes of C; 0, or more than the vocabulary, takes all
            tokens. None: 1 in every row.
        num_candidates: [rows] int32 that is overwritten with the sizes of C, or None.

    Returns:
        [rows, vocab] float32 log-probabilities (float64 if an input is); each row sums to one.

    Source: Gera et al. 2023, arXiv:2305.01628, eq. 3; IBM's ``calculate_contrasted_logits``.
    """
    dtype = torch.promote_types(torch.promote_types(upper.dtype, lower.dtype), torch.float32)
    upper, lower = upper.to(dtype).clamp(max=torch.finfo(dtype).max), lower.to(dtype)
    plausible = _plausible(upper, alpha, min_candidates)
    if num_candidates is not None:
        num_candidates.copy_(plausible.sum(-1))
    log_p = upper - _normaliser(upper)
    ratio = torch.where(plausible, upper - lower, -math.inf)
    best = ratio.amax(-1, keepdim=True)
    limit = torch.where(plausible & (ratio == best), upper, -math.inf)
    ratio = torch.where(best.isinf(), limit, ratio)
    mass = torch.where(plausible, log_p, -math.inf).logsumexp(-1, keepdim=True)
    return torch.where(plausible, ratio.log_softmax(-1) + mass, log_p)


@register_op
def contrast_heads(
    upper_hidden: Tensor,
    upper_weight: Weight,
    lower_hidden: Tensor,
    lower_weight: Weight,
    alpha: Tensor,
    min_candidates: Tensor | None = None,
    num_candidates: Tensor | None = None,
) -> Tensor:
    """``contrast_logits`` of two heads, reading of the lower head only what the result needs.

    The lower logits matter at plausible tokens only, so on the CPU just those rows of the lower
    head are read (none for a row with one candidate) while the pairs of row and plausible token
    are at most ``SPARSE_SHARE`` of the vocabulary for each of the first four rows. Flatter
    distributions, and devices where the host would have to wait for that number, take both heads
    in full.

    Args:
        upper_hidden: [rows, hidden_size] normalised hidden states of the later exit.
        upper_weight: [vocab, hidden_size] of its head, same dtype, or quantized.
        lower_hidden: [rows, hidden_size] of the earlier exit.
        lower_weight: [vocab, hidden_size] of its head, same dtype, or quantized.
        alpha: [rows] float32, see ``contrast_logits``.
        min_candidates: [rows] int64 or None, see ``contrast_logits``.
        num_candidates: [rows] int32 that is overwritten, or None, see ``contrast_logits``.

    Returns:
        [rows, vocab] float32 log-probabilities, equal to ``contrast_logits`` of both heads' logits
        up to rounding (float64 for float64 inputs).

    Source: Gera et al. 2023, arXiv:2305.01628, eq. 3; IBM's ``calculate_contrasted_logits``, which
        multiplies with both heads in full.
    """
    upper = head_logits(upper_hidden, upper_weight)
    if upper.device.type == "cpu":
        upper.clamp_(max=torch.finfo(upper.dtype).max)
        num_rows, vocab = upper.shape
        rows, tokens = _plausible(upper, alpha, min_candidates).nonzero(as_tuple=True)
        if tokens.shape[0] <= SPARSE_SHARE * vocab * min(num_rows, 4):
            counts = rows.bincount(minlength=num_rows).tolist() if num_rows > 1 else [len(tokens)]
            if num_candidates is not None:
                num_candidates.copy_(torch.tensor(counts))
            return _contrast_candidates(
                upper, torch.split(tokens, counts), lower_hidden, lower_weight
            )
    lower = head_logits(lower_hidden, lower_weight)
    return contrast_logits(upper, lower, alpha, min_candidates, num_candidates)


def _plausible(upper: Tensor, alpha: Tensor, min_candidates: Tensor | None) -> Tensor:
    """[rows, vocab] bool: the set C of ``contrast_logits``, without tokens of logit -inf."""
    alpha = alpha.to(upper.dtype).clamp(0, 1)
    threshold = upper.amax(-1) + alpha.log()
    if min_candidates is not None:
        threshold = torch.minimum(threshold, _mth_largest(upper, min_candidates))
    # No threshold lies below the least finite number, so -inf never passes.
    return upper >= threshold.clamp(min=torch.finfo(upper.dtype).min)[:, None]


def _mth_largest(upper: Tensor, m: Tensor) -> Tensor:
    """[rows] the m-th largest logit, -inf where m is 0 or more than the vocabulary."""
    vocab = upper.shape[1]
    m = torch.where((m <= 0) | (m > vocab), vocab + 1, m)
    if upper.device.type != "cpu":
        found = upper.sort(-1, descending=True).values
    else:
        within = m[m <= vocab]
        largest = int(within.max()) if within.shape[0] else 1
        found = upper.topk(largest, -1).values if largest > 1 else upper.amax(-1, keepdim=True)
    mth = found.gather(1, (m - 1).clamp(max=found.shape[1] - 1)[:, None])[:, 0]
    return mth.masked_fill(m > vocab, -math.inf)


def _normaliser(upper: Tensor) -> Tensor:
    """[rows, 1] logsumexp; finite for a row of nothing but -inf, which then stays as it is."""
    return upper.logsumexp(-1, keepdim=True).clamp_(min=torch.finfo(upper.dtype).min)


def _contrast_candidates(
    upper: Tensor, candidates: Sequence[Tensor], lower_hidden: Tensor, lower_weight: Weight
) -> Tensor:
    """The contrast on the CPU, from the lower logits of each row's candidates alone."""
    normaliser = _normaliser(upper)
    log_p = upper - normaliser
    for row, tokens in enumerate(candidates):
        if tokens.shape[0] < 2:
            continue  # a single candidate keeps its own mass
        own = upper[row].index_select(0, tokens)
        ratio = own - _logits_at(tokens, lower_hidden[row], lower_weight).to(own.dtype)
        best = float(ratio.amax())
        if math.isinf(best):
            ratio = torch.where(ratio == best, own, -math.inf)
        shared = ratio.log_softmax(0) + (own.logsumexp(0) - normaliser[row])
        log_p[row].index_copy_(0, tokens, shared)
    return log_p


def _logits_at(tokens: Tensor, hidden: Tensor, weight: Weight) -> Tensor:
    """[tokens] logits of one row, in float32 at least."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    hidden = hidden.to(dtype)
    if isinstance(weight, QuantizedWeight):
        weight = dequantize(weight, dtype)
    parts = [
        torch.mv(weight.index_select(0, part).to(dtype), hidden)
        for part in torch.split(tokens, FETCHED_ROWS)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _kernel_reads(
    upper_hidden: Tensor,
    upper_weight: Weight,
    lower_hidden: Tensor,
    lower_weight: Weight,
    alpha: Tensor,
    min_candidates: Tensor | None = None,
    num_candidates: Tensor | None = None,
) -> bool:
    return is_plain(upper_hidden, lower_hidden, upper_weight) and is_streamable(
        upper_weight, lower_weight
    )


contrast_heads.backend(
    "cpu", "multiexit_engine._native:contrast_heads", device="cpu", supports=_kernel_reads
)
