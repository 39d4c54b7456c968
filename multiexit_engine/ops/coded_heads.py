"""Vocabulary heads in 8-bit codes on both sides: rough logits, and how far off they can be.

Knows nothing of who asks, or of what is decided by the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from multiexit_engine.checkpoint.huge_pages import HugePages
from multiexit_engine.ops.heads import HeadStatistics, head_logits, statistics_of_logits
from multiexit_engine.ops.operands import is_plain, is_streamable
from multiexit_engine.ops.registry import is_reference_forced, register_op

# Rows whose codes lie together, and columns of each of them that do.
LANES, GROUP = 16, 4
_LARGEST = 127
_ROWS_AT_ONCE = 4096
# Tokens near the best one of a row that a backend keeps at least.
MOST_NEAR = 256


@dataclass(frozen=True, eq=False)
class CodedHead:
    """A head as ``code * scale of its row``, and what its logits may lack.

    Attributes:
        codes: [blocks of 16 rows, groups of 4 columns, 16, 4] int8; padding is the code 0.
        starts: [padded rows] int32, -128 times the sum of a row's codes.
        scales: [padded rows] float32.
        vocab: rows without padding.
        norm: of the longest row, l2.
        error: of the longest difference between a row and its codes, l2; NaN or infinite where the
            head has such numbers.
    """

    codes: Tensor
    starts: Tensor
    scales: Tensor
    vocab: int
    norm: float
    error: float


@dataclass(frozen=True, eq=False)
class CodedHidden:
    """Hidden states as ``(code - 128) * scale of the row``.

    Attributes:
        codes: [rows, hidden_size padded to a multiple of 4] uint8.
        scales: [rows] float32.
        norms: [rows] float64, l2, of the states themselves.
        errors: [rows] float64, l2, of what the codes lack; NaN where a state has no number.
    """

    codes: Tensor
    scales: Tensor
    norms: Tensor
    errors: Tensor


def are_codes_fast() -> bool:
    """Whether codes are multiplied faster than float32: by the C++ kernels, on a CPU with VNNI."""
    if is_reference_forced():
        return False
    try:
        kernels = import_module("multiexit_engine._C")
    except ImportError:
        return False
    return bool(kernels.isa() == "avx512bf16")


def code_head(weight: Tensor) -> CodedHead:
    """The nearest codes of a [vocab, hidden_size] float32 matrix, row by row."""
    parts = [code_hidden(part) for part in torch.split(weight, _ROWS_AT_ONCE)]
    signed = [(part.codes.to(torch.int16) - 128).to(torch.int8) for part in parts]
    codes = _padded(torch.cat(signed), LANES)
    scales = torch.cat([part.scales for part in parts])
    scales = F.pad(scales, (0, codes.shape[0] - weight.shape[0]))
    norm = float(torch.cat([part.norms for part in parts]).max())
    error = torch.cat([part.errors for part in parts]).max()
    starts = -128 * codes.sum(1, dtype=torch.int32)
    turned = codes.view(-1, LANES, codes.shape[1] // GROUP, GROUP).transpose(1, 2)
    blocks = HugePages().empty(turned.shape, torch.int8).copy_(turned)
    return CodedHead(blocks, starts, scales, weight.shape[0], norm, float(error))


@register_op
def code_hidden(hidden: Tensor) -> CodedHidden:
    """The nearest codes of states, row by row: those of 127 equal steps up to its greatest number.

    Args:
        hidden: [rows, hidden_size] float32.

    Returns:
        CodedHidden; the codes of a row with a number that is not finite mean nothing.

    Source: round-to-nearest absmax, Dettmers et al. 2022, arXiv:2208.07339, section 2.1, by row.
    """
    scales = hidden.abs().amax(1) / _LARGEST
    divisors = scales.masked_fill(scales == 0, 1.0)[:, None]
    rounded = (hidden / divisors).round_().nan_to_num_(0.0).clamp_(-_LARGEST, _LARGEST)
    lacking = hidden.double() - rounded.double() * scales.double()[:, None]
    codes = F.pad(rounded + 128, (0, -hidden.shape[1] % GROUP), value=128.0).to(torch.uint8)
    return CodedHidden(codes, scales, hidden.double().norm(dim=1), lacking.norm(dim=1))


def logit_errors(hidden: CodedHidden, head: CodedHead, bias: Tensor | None) -> Tensor:
    """[rows] float64: how far any rough logit is from the one that a float32 product gives.

    With h = h' + e and w = w' + f the logits differ by e.w' + h.f, so by Cauchy-Schwarz by no more
    than |e| |w'| + |h| |f|. The rest is rounding: of n products and sums in float32, at most
    n 2^-23 |h| |w|, and of the steps that follow, in either.
    """
    columns = hidden.codes.shape[1]
    coding = hidden.errors * (head.norm + head.error) + hidden.norms * head.error
    greatest = 0.0
    if bias is not None and bias.numel():
        greatest = float(bias.abs().masked_fill(bias == -torch.inf, 0.0).max())
    size = hidden.norms * head.norm + greatest
    return coding + columns * 2.0**-23 * hidden.norms * head.norm + size * 2.0**-20 + 1e-4


@register_op
def coded_head_statistics(
    hidden: Tensor,
    hidden_scales: Tensor,
    codes: Tensor,
    starts: Tensor,
    scales: Tensor,
    vocab: int,
    bias: Tensor | None = None,
) -> HeadStatistics:
    """``head_statistics`` of the logits that codes stand for; sums of codes are exact.

    Args:
        hidden: [rows, columns] uint8, code + 128.
        hidden_scales: [rows] float32.
        codes: of ``CodedHead``, as the next two.
        starts: what makes up for the 128 of ``hidden``.
        scales: of the rows.
        vocab: rows without padding.
        bias: [vocab] float32, or None.

    Returns:
        HeadStatistics in float32.

    Source: products of 8-bit codes on both sides, Dettmers et al. 2022, arXiv:2208.07339, section
        2.1, by row.
    """
    logits = _rough_logits(hidden, hidden_scales, codes, scales, vocab)
    return statistics_of_logits(logits if bias is None else logits + bias)


@register_op
def coded_head_tokens(
    hidden: Tensor,
    weight: Tensor,
    states: CodedHidden,
    head: CodedHead,
    errors: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """The most likely token of each row: rough logits name all that can be, exact ones decide.

    With every rough logit within e of the exact one, no token whose rough logit is more than 2 e
    below the greatest one is the best. Gives the tokens of ``head_tokens`` of greedy rows.

    Args:
        hidden: [rows, hidden_size] float32.
        weight: [vocab, hidden_size] float32.
        states: codes of ``hidden``.
        head: codes of ``weight``.
        errors: [rows] float64, of ``logit_errors``.
        bias: [vocab] float32 added to the logits, or None.

    Returns:
        [rows] int64; of equals the lowest. -1 where an error is not finite, and perhaps where more
        than ``MOST_NEAR`` tokens are near the best one.

    Source: codes as in ``coded_head_statistics``; a superset by bounds, then exact scores, as
        branch-and-bound search of greatest inner products, Ram and Gray 2012, arXiv:1202.6101.
    """
    exact = head_logits(hidden, weight, bias)
    rough = _rough_logits(states.codes, states.scales, head.codes, head.scales, head.vocab)
    rough = (rough if bias is None else rough + bias).double()
    is_far = rough < rough.amax(1, keepdim=True) - 2 * errors[:, None]
    tokens = exact.masked_fill(is_far, -torch.inf).argmax(1)
    return tokens.masked_fill(~errors.isfinite(), -1)


code_hidden.backend("cpu", "multiexit_engine._native:code_hidden", device="cpu")
coded_head_tokens.backend(
    "cpu",
    "multiexit_engine._native:coded_head_tokens",
    device="cpu",
    supports=lambda hidden, weight, *_: is_plain(hidden, weight) and is_streamable(weight),
)
coded_head_statistics.backend("cpu", "multiexit_engine._native:coded_head_statistics", device="cpu")


def _rough_logits(
    hidden: Tensor, hidden_scales: Tensor, codes: Tensor, scales: Tensor, vocab: int
) -> Tensor:
    """[rows, vocab] float32 that the codes stand for, without a bias."""
    rows = codes.transpose(1, 2).flatten(2).flatten(0, 1)[:vocab].double()
    sums = (hidden.double() - 128) @ rows.T
    return sums.float() * scales[:vocab] * hidden_scales[:, None]


def _padded(matrix: Tensor, rows: int) -> Tensor:
    return F.pad(matrix, (0, 0, 0, -matrix.shape[0] % rows))
