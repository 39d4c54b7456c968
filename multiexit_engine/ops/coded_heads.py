"""Vocabulary heads in 8-bit codes on both sides: rough logits, and how far off they can be.

Knows nothing of who asks, or of what is decided by the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from multiexit_engine.checkpoint.huge_pages import HugePages
from multiexit_engine.ops.registry import is_reference_forced, register_op

# Rows whose codes lie together, and columns of each of them that do.
LANES, GROUP = 16, 4
_LARGEST = 127
# Steps of a second term to one of the first: it covers half a step to either side.
_FINER = 2 * _LARGEST
ROWS_AT_ONCE = 4096
# Makes up for the rounding of a bound itself.
_UP = 1 + 2.0**-20
# The greatest number of each bias: PyTorch's threads would wake to find it for each call.
_GREATEST = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class CodedHead:
    """A head less its mean row, as ``code * scale of its row * scale of its column``.

    What all rows have in common decides nothing between tokens, and a column that sticks out would
    coarsen the codes of all others: neither is in the codes. All lengths are l2, of rows whose
    columns are divided by the columns' scales.

    Attributes:
        codes: [blocks of 16 rows, groups of 4 columns, 16, 4] int8; padding is the code 0.
        starts: [padded rows] int32, -128 times the sum of a row's codes.
        scales: [padded rows] float32.
        columns: [hidden_size] float32, scales of the columns: states are multiplied by them before
            they are coded.
        errors: [padded rows] float32, no less than the length of what a row's codes lack; NaN or
            infinite where the head has such numbers.
        mean: [hidden_size] float32, what the codes of all rows lack.
        vocab: rows without padding.
        norm: of the longest row as it is.
        size: of the longest row of codes.
    """

    codes: Tensor
    starts: Tensor
    scales: Tensor
    columns: Tensor
    errors: Tensor
    mean: Tensor
    vocab: int
    norm: float
    size: float

    @cached_property
    def error(self) -> float:
        """The greatest of ``errors``; PyTorch's threads would wake to find it for each call."""
        return float(self.errors.max())


@dataclass(frozen=True, eq=False)
class CodedHidden:
    """Hidden states as ``(code - 128) * scale of the term and row``, summed over one or two terms.

    Attributes:
        codes: [rows, terms, hidden_size padded to a multiple of 4] uint8.
        scales: [rows, terms] float32.
        norms: [rows] float64, l2, of the states themselves.
        errors: [rows] float64, l2, of what the codes lack; NaN where a state has no number.
    """

    codes: Tensor
    scales: Tensor
    norms: Tensor
    errors: Tensor


@dataclass(frozen=True, eq=False)
class LogitBounds:
    """A rough logit is off by no more than ``reach of its row * error of its token + slack``.

    The differences between the logits of a row are meant: all may be off by one number more.

    Attributes:
        reaches: [rows] float32.
        slacks: [rows] float64; not finite where nothing is known.
    """

    reaches: Tensor
    slacks: Tensor


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
    """The nearest codes of a [vocab, hidden_size] matrix of floats, row by row.

    Source: scales of columns as of states before their products, Xiao et al. 2022,
        arXiv:2211.10438, section 4, by the weights alone.
    """
    vocab = weight.shape[0]
    mean = sum(part.double().sum(0) for part in torch.split(weight, ROWS_AT_ONCE)) / vocab
    mean = torch.as_tensor(mean).float()
    squares = sum(
        (part - mean).double().square_().sum(0) for part in torch.split(weight, ROWS_AT_ONCE)
    )
    columns = (torch.as_tensor(squares) / vocab).sqrt().float()
    columns.masked_fill_(columns == 0, 1.0)
    parts, norms = [], []
    for part in torch.split(weight, ROWS_AT_ONCE):
        parts.append(code_hidden((part - mean) / columns))
        norms.append((part / columns).double().norm(dim=1))
    return _coded_head(parts, columns, mean, float(torch.cat(norms).max()) * _UP, 0.0)


def finer_head(weight: Tensor, head: CodedHead) -> CodedHead:
    """The nearest codes of what a matrix's codes lack: added to them they stand for its rows.

    Its errors and sizes are those of the sums of both.
    """
    parts = []
    for part, coded in zip(
        torch.split(weight, ROWS_AT_ONCE), decoded_rows(head, ROWS_AT_ONCE), strict=True
    ):
        rows = (part - head.mean) / head.columns
        found = code_hidden(rows - coded[: len(part), : part.shape[1]])
        # of what is rounded here the rows' own length bounds the size
        parts.append(replace(found, norms=rows.double().norm(dim=1)))
    return _coded_head(parts, head.columns, head.mean, head.norm, head.size)


def decoded_rows(head: CodedHead, count: int) -> Iterator[Tensor]:
    """[count, padded hidden_size] float32, of so many rows at once, a multiple of 16."""
    scales = torch.split(head.scales, count)
    for codes, scale in zip(torch.split(head.codes, count // LANES), scales, strict=True):
        yield codes.transpose(1, 2).flatten(2).flatten(0, 1).float() * scale[:, None]


def _coded_head(
    parts: Sequence[CodedHidden], columns: Tensor, mean: Tensor, norm: float, least_size: float
) -> CodedHead:
    """Of the codes of the rows, of which ``norms`` are what rounding goes by."""
    vocab = sum(len(part.codes) for part in parts)
    signed = [(part.codes[:, 0].to(torch.int16) - 128).to(torch.int8) for part in parts]
    codes = _padded(torch.cat(signed), LANES)
    own_norms = torch.cat([part.norms for part in parts])
    # the difference and the quotient are rounded, too
    errors = torch.cat([part.errors for part in parts]) + 2.0**-22 * own_norms
    starts = -128 * codes.sum(1, dtype=torch.int32)
    turned = codes.view(-1, LANES, codes.shape[1] // GROUP, GROUP).transpose(1, 2)
    return CodedHead(
        HugePages().empty(turned.shape, torch.int8).copy_(turned),
        starts,
        F.pad(torch.cat([part.scales[:, 0] for part in parts]), (0, codes.shape[0] - vocab)),
        columns,
        F.pad((errors * _UP).float(), (0, codes.shape[0] - vocab)),
        mean,
        vocab,
        norm,
        max(float((own_norms + errors).max()), least_size),
    )


def code_states(hidden: Tensor, head: CodedHead, num_terms: int = 1) -> CodedHidden:
    """The codes of [rows, hidden_size] float32 states that are multiplied with a head's.

    Args:
        hidden: [rows, hidden_size].
        head: whose codes they are for.
        num_terms: 2 for states as of 16 bits, whose own error is next to nothing.
    """
    return code_hidden(hidden, num_terms, head.columns)


@register_op
def code_hidden(hidden: Tensor, num_terms: int = 1, columns: Tensor | None = None) -> CodedHidden:
    """The nearest codes of states, row by row: those of 127 equal steps up to its greatest number.

    Args:
        hidden: [rows, hidden_size].
        num_terms: 1, or 2: the second codes what the first lacks, in steps of a 254th.
        columns: [hidden_size] float32 that the states are multiplied by first, or None.

    Returns:
        CodedHidden; the codes of a row with a number that is not finite mean nothing.

    Source: round-to-nearest absmax, Dettmers et al. 2022, arXiv:2208.07339, section 2.1, by row.
    """
    hidden = hidden.float()
    if columns is not None:
        hidden = hidden * columns
    scales = hidden.abs().amax(1) / _LARGEST
    rounded = (hidden / _divisors(scales)).round_().nan_to_num_(0.0).clamp_(-_LARGEST, _LARGEST)
    lacking = hidden.double() - rounded.double() * scales.double()[:, None]
    terms, all_scales = [rounded], [scales]
    if num_terms == 2:
        scales = scales / _FINER
        rounded = (lacking / _divisors(scales).double()).round_().nan_to_num_(0.0)
        rounded = rounded.float().clamp_(-_LARGEST, _LARGEST)
        lacking = lacking - rounded.double() * scales.double()[:, None]
        terms.append(rounded)
        all_scales.append(scales)
    shifted = torch.stack(terms, 1) + 128
    codes = F.pad(shifted, (0, -hidden.shape[1] % GROUP), value=128.0).to(torch.uint8)
    norms = hidden.double().norm(dim=1)
    return CodedHidden(codes, torch.stack(all_scales, 1), norms, lacking.norm(dim=1))


def logit_bounds(hidden: CodedHidden, head: CodedHead, bias: Tensor | None) -> LogitBounds:
    """How far rough logits are from those that a float32 product gives.

    With h = h' + e and w = w' + f, less what all rows have in common, the logits differ by
    e.w' + h.f, so by Cauchy-Schwarz by no more than |e| |w'| + |h| |f|. The rest is rounding: of n
    products and sums in float32, which the kernels make in eight lanes at least, no more than
    (n / 8 + 16) 2^-23 |h| |w|, and of the steps that follow, in either. What all have in common is
    h times the mean row.
    """
    coding = (hidden.errors + hidden.norms * 2.0**-23) * head.size
    slacks = coding + logit_roundings(hidden, head, bias)
    return LogitBounds((hidden.norms * _UP).float(), slacks)


def logit_roundings(hidden: CodedHidden, head: CodedHead, bias: Tensor | None) -> Tensor:
    """[rows] float64: of ``logit_bounds`` what does not come from codes."""
    columns = hidden.codes.shape[-1]
    size = hidden.norms * (head.norm + head.size) + _greatest(bias)
    return (columns / 8 + 16) * 2.0**-23 * hidden.norms * head.norm + size * 2.0**-20 + 1e-4


def rough_logits(hidden: CodedHidden, head: CodedHead, bias: Tensor | None) -> Tensor:
    """[rows, vocab] float32 that the codes stand for: of each row less one number."""
    products = _summed_products(hidden.codes, hidden.scales, head.codes, head.scales)
    logits = products[:, : head.vocab]
    return logits if bias is None else logits + bias


code_hidden.backend("cpu", "multiexit_engine._native:code_hidden", device="cpu")


def _greatest(bias: Tensor | None) -> float:
    """Of the magnitudes of a bias that is never changed, but for -inf."""
    if bias is None or not bias.numel():
        return 0.0
    if bias not in _GREATEST:
        _GREATEST[bias] = float(bias.abs().masked_fill(bias == -torch.inf, 0.0).max())
    return float(_GREATEST[bias])


def _summed_products(
    hidden: Tensor, hidden_scales: Tensor, codes: Tensor, scales: Tensor
) -> Tensor:
    """[rows, padded vocab] float32 of all terms."""
    terms = range(hidden.shape[1])
    parts = [_products(hidden[:, i], hidden_scales[:, i], codes, scales) for i in terms]
    return torch.stack(parts).sum(0)


def _products(hidden: Tensor, hidden_scales: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """[rows, padded vocab] float32 of one term."""
    rows = codes.transpose(1, 2).flatten(2).flatten(0, 1).double()
    sums = (hidden.double() - 128) @ rows.T
    return sums.float() * scales * hidden_scales[:, None]


def _divisors(scales: Tensor) -> Tensor:
    return scales.masked_fill(scales == 0, 1.0)[:, None]


def _padded(matrix: Tensor, rows: int) -> Tensor:
    return F.pad(matrix, (0, 0, 0, -matrix.shape[0] % rows))
