"""Vocabulary heads: hidden states to logits, and figures of their distributions.

Knows nothing of exits or of contrast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from multiexit_engine.ops.operands import is_dense_or_coded, is_plain, is_streamable
from multiexit_engine.ops.registry import register_op
from multiexit_engine.quantization import QuantizedWeight, Weight, as_tensor, first_rows


@register_op
def head_logits(hidden: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """Project hidden states on the vocabulary.

    A half-precision product is accumulated in float32 and stays so; only the reference on the CPU
    rounds it to the weights' dtype once.

    Args:
        hidden: [rows, hidden_size] normalised hidden states, any float dtype.
        weight: [vocab, hidden_size] of the same dtype and device, or quantized.
        bias: [vocab] added to every row's logits, or None.

    Returns:
        [rows, vocab] float32 logits (float64 for float64 inputs).

    Source: ``lm_head`` of every causal model in transformers.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if isinstance(weight, QuantizedWeight):
        hidden, weight = hidden.to(dtype), as_tensor(weight, dtype)
    if hidden.device.type == "cuda" and hidden.dtype != dtype and hidden.shape[0]:
        logits = torch.mm(hidden, weight.T, out_dtype=dtype)
    else:
        logits = F.linear(hidden, weight).to(dtype)
    return logits if bias is None else logits + bias.to(dtype)


head_logits.backend(
    "triton",
    "multiexit_engine.kernels.products:head_logits",
    device="cuda",
    supports=lambda hidden, weight, bias=None: (
        isinstance(weight, QuantizedWeight) and is_plain(hidden)
    ),
)
head_logits.backend(
    "cpu",
    "multiexit_engine._native:head_logits",
    device="cpu",
    supports=lambda hidden, weight, bias=None: is_plain(hidden, weight) and is_streamable(weight),
)


class HeadStatistics(NamedTuple):
    """What a gate may ask of each row's distribution, all [rows].

    Attributes:
        tokens: int64, the most likely token; of equals the lowest id.
        log_probs: its log-probability.
        second_log_probs: that of the next one, equal in a tie; -inf where there is one token only.
        log_sum_exp: of the logits: ``log_probs + log_sum_exp`` is the greatest logit.
        entropy: in nats, 0 to log(number of tokens).
    """

    tokens: Tensor
    log_probs: Tensor
    second_log_probs: Tensor
    log_sum_exp: Tensor
    entropy: Tensor


@register_op
def head_statistics(
    hidden: Tensor, weight: Weight, bias: Tensor | None = None, shortlist: int | None = None
) -> HeadStatistics:
    """Best token, runner-up and entropy of ``softmax(head_logits)``: what gates of exits ask.

    A backend need not bring logits to memory. A row does not depend on the other rows, up to the
    rounding of logits. A logit of -inf is a token that cannot be; NaN, or +inf, among a row's
    logits makes all of its numbers NaN and its token meaningless.

    Args:
        hidden: [rows, hidden_size] normalised hidden states, any float dtype.
        weight: [vocab, hidden_size] of the same dtype and device, or quantized.
        bias: [vocab] added to every row's logits, or None.
        shortlist: only the first so many tokens count, 1 to vocab: a gate that reads a part of the
            head, which tokenizers sorted by frequency put in front. None: all.

    Returns:
        HeadStatistics in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shortlist is not within the vocabulary.

    Source: the gates of CALM, Schuster et al. 2022, arXiv:2207.07061 (the top two probabilities),
        and DeeBERT, Xin et al. 2020, arXiv:2004.12993 (entropy).
    """
    if shortlist is not None:
        weight = first_rows(weight, shortlist)
        bias = None if bias is None else bias[:shortlist]
    return statistics_of_logits(head_logits(hidden, weight, bias))


def statistics_of_logits(logits: Tensor) -> HeadStatistics:
    """The same of [rows, vocab] logits in memory."""
    log_sum_exp = logits.logsumexp(-1)
    log_probs = logits - log_sum_exp[:, None]
    tokens = logits.argmax(-1)
    best = log_probs.gather(1, tokens[:, None])
    others = log_probs.scatter(1, tokens[:, None], -torch.inf)
    surprise = torch.where(log_probs == -torch.inf, 0.0, log_probs.exp() * log_probs)
    entropy = -surprise.sum(-1)
    numbers = best[:, 0], others.amax(-1), log_sum_exp, entropy
    broken = entropy.isnan()
    return HeadStatistics(tokens, *(each.masked_fill(broken, torch.nan) for each in numbers))


head_statistics.backend(
    "triton",
    "multiexit_engine.kernels.head_statistics:head_statistics",
    device="cuda",
    supports=lambda hidden, weight, bias=None, shortlist=None: is_dense_or_coded(
        [hidden], [weight]
    ),
)
head_statistics.backend(
    "cpu",
    "multiexit_engine._native:head_statistics",
    device="cpu",
    supports=lambda hidden, weight, bias=None, shortlist=None: (
        is_plain(hidden, weight) and is_streamable(weight)
    ),
)
