"""Products with weight matrices, and what stands before and behind them in a layer.

Up to 64 rows the weights are streamed once through small tiles, in one launch with the norm before
the product and the bias, activation and residual behind it. For more rows PyTorch multiplies.

Up to 64 rows a row's bits do not depend on the others: its sums run over the same columns in the
same order on the same instruction, and which program adds the parts of a sum decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional

from multiexit_engine.kernels.activations import FORMS
from multiexit_engine.kernels.launch import kept_scratch, options
from multiexit_engine.kernels.matrices import Matrix, stored
from multiexit_engine.kernels.norms import NORM_ROWS, norm
from multiexit_engine.kernels.overlap import fetched, overlapped
from multiexit_engine.kernels.product_tiles import product_kernel
from multiexit_engine.kernels.row_lists import RowList

# More rows are PyTorch's.
MAX_ROWS = 64
# More rows are normalised by a launch of their own, as every tile would read them whole; those of
# float32 too, whose products without tensor cores leave no registers for it.
MAX_NORMED_ROWS = NORM_ROWS.value
# Programs that fill a large card, and the columns that each of them should have at least.
_PROGRAMS = 512
_MIN_SPLIT = 256
_STEP = 128
_MAX_SPLITS = 16
_KEPT_TICKETS = 16 * _PROGRAMS


class Norm(NamedTuple):
    """LayerNorm, or RMSNorm where there is no shift."""

    gain: Tensor
    shift: Tensor | None
    eps: float


class Tile(NamedTuple):
    """How a product is cut.

    Attributes:
        block_v: weight rows of a tile. 32 keep it on mma.sync on every card, for any block_r.
        block_r: rows of x.
        block_k: columns of one step.
        num_stages: loads in flight.
        num_warps: of a program.
        max_registers: of a thread; None leaves them to the compiler.
    """

    block_v: int
    block_r: int
    block_k: int
    num_stages: int
    num_warps: int
    max_registers: int | None = None


def tile_for(rows: int, dtype: torch.dtype) -> Tile:
    """The tile for a number of rows, up to MAX_ROWS."""
    if dtype == torch.float32:
        return Tile(32, 16, 64, 3, 4, 128)
    if rows <= 16:
        return Tile(32, 16, 128, 4, 4, 128)
    if rows <= 32:
        return Tile(32, 32, 128, 4, 8)
    return Tile(32, 64, 64, 6, 8, 128)


def splits_for(out_features: int, width: int) -> int:
    """In how many parts sums are cut: enough programs for a card, whatever the rows."""
    tiles = triton.cdiv(out_features, 32)
    wanted = triton.next_power_of_2(triton.cdiv(_PROGRAMS, tiles))
    return int(max(1, min(wanted, _MAX_SPLITS, width // _MIN_SPLIT)))


def product(
    x: Tensor,
    weight: Matrix,
    bias: Tensor | None = None,
    *,
    norm_before: Norm | None = None,
    activation: str | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    listed: RowList | None = None,
    output: Tensor | None = None,
    ahead: Matrix | None = None,
) -> Tensor:
    """``residual + activation(norm(x) @ weight.T + bias)``, in one launch up to 64 rows.

    Args:
        x: [rows, in_features], in the dtype of the weights or in float32, then rounded to it.
        weight: [out_features, in_features], contiguous, or quantized: then for any number of rows
            its codes are multiplied as they are.
        bias: [out_features].
        norm_before: of x; its result is rounded to the dtype of the weights.
        activation: a key of ``activations.FORMS``.
        gated: the first half of the outputs, activated, times the second: half as many.
        residual: [rows, outputs], of any float dtype.
        dtype: of the result; that of the weights, or of the rows that meet codes, by default.
        listed: the rows that are multiplied; all by default. With a list any number of rows is
            multiplied here, and a row has the bits that it has among few rows.
        output: [rows, outputs] contiguous, to be written to; may be ``residual``. New by default.
        ahead: a matrix of a later launch, whose first bytes are asked for meanwhile.

    Returns:
        [rows, outputs]; rows that are not listed are as ``output`` had them.
    """
    rows = x.shape[0]
    if listed is None:
        x, norm_before = ready(x, weight, norm_before)
    else:
        assert norm_before is None, "a norm of listed rows is a launch of its own"
    dtype = dtype or (weight.dtype if isinstance(weight, Tensor) else x.dtype)
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    if rows > MAX_ROWS and isinstance(weight, Tensor) and listed is None:
        return _wide(x, weight, bias, activation, gated, residual, dtype)
    if output is None:
        output = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    if rows:
        _launch(x, weight, bias, norm_before, activation, gated, residual, output, listed, ahead)
    return output


def linear(x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    """See ``multiexit_engine.ops.linear``. One launch."""
    return product(x, weight, bias)


def linear_activation(x: Tensor, weight: Matrix, bias: Tensor | None, kind: str) -> Tensor:
    """See ``multiexit_engine.ops.linear``. One launch up to 64 rows; rounds once."""
    return product(x, weight, bias, activation=kind)


def head_logits(hidden: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """See ``multiexit_engine.ops.heads``. One launch."""
    return product(hidden, weight, bias, dtype=torch.float32)


class Cut(NamedTuple):
    """The programs of a product, and where they leave their parts of its sums.

    Attributes:
        grid: parts, tiles, blocks of rows.
        step: columns of a part.
        partial: float32 scratch, None where sums are not cut.
        ticket: int32 counters that stand at 0.
        constants: of the kernel.
        options: of the launch.
    """

    grid: tuple[int, int, int]
    step: int
    partial: Tensor | None
    ticket: Tensor | None
    constants: dict[str, Any]
    options: dict[str, int]


def cut(
    x: Tensor, out_features: int, dtype: torch.dtype, is_paired: bool, is_listed: bool = False
) -> Cut:
    """How a product in ``dtype`` is launched.

    ``is_paired``: both halves of a tile make one output. ``is_listed``: some of the rows only.
    """
    rows, width = x.shape
    tile = tile_for(rows, dtype)
    splits = splits_for(out_features, width) if rows <= MAX_ROWS or is_listed else 1
    pairs = 2 if is_paired else 1
    tiles = triton.cdiv(out_features // pairs, tile.block_v // pairs)
    blocks = triton.cdiv(rows, tile.block_r)
    partial = ticket = None
    if splits > 1:
        cells = blocks * tiles * splits * tile.block_v * tile.block_r
        partial = torch.empty(cells, dtype=torch.float32, device=x.device)
        ticket = _tickets(blocks * tiles, x.device)
    constants = {
        "SPLITS": splits, "EVEN": width % tile.block_k == 0, "BLOCK_V": tile.block_v,
        "BLOCK_R": tile.block_r, "BLOCK_K": tile.block_k, "STAGES": tile.num_stages,
    }  # fmt: skip
    # of no tile's own width: where sums are cut must not depend on the rows
    step = triton.cdiv(width, splits * _STEP) * _STEP
    launch = options(tile.num_warps, tile.max_registers)
    return Cut((splits, tiles, blocks), step, partial, ticket, constants, launch)


def _tickets(count: int, device: torch.device) -> Tensor:
    """int32 counters that stand at 0: kept ones, unless rows of a list are very many."""
    if count > _KEPT_TICKETS:
        return torch.zeros(count, dtype=torch.int32, device=device)
    return kept_scratch("products", [0.0], _KEPT_TICKETS, device).view(torch.int32)


def norm_kind(norm_before: Norm | None) -> str:
    """What kernels call it."""
    if norm_before is None:
        return "none"
    return "rms" if norm_before.shift is None else "layer"


def ready(x: Tensor, weight: Matrix, norm_before: Norm | None) -> tuple[Tensor, Norm | None]:
    """What a product reads of x, and the norm that is left to take inside it."""
    rows = x.shape[0]
    if not isinstance(weight, Tensor):
        if norm_before is not None:
            x = norm(x, *norm_before, dtype=norm_before.gain.dtype)
        return (x if x.stride(1) == 1 else x.contiguous()), None
    is_fused = 0 < rows <= MAX_NORMED_ROWS and weight.dtype != torch.float32
    if norm_before is not None and not is_fused:
        x, norm_before = norm(x, *norm_before, dtype=weight.dtype), None
    if rows > MAX_ROWS:
        x = x.to(weight.dtype)
    return (x if x.stride(1) == 1 else x.contiguous()), norm_before


def _launch(
    x: Tensor,
    weight: Matrix,
    bias: Tensor | None,
    norm_before: Norm | None,
    activation: str | None,
    gated: bool,
    residual: Tensor | None,
    output: Tensor,
    listed: RowList | None,
    ahead: Matrix | None,
) -> None:
    rows, width = x.shape
    own = stored(weight)
    dtype = x.dtype if own.bits else own.numbers.dtype
    how = cut(x, weight.shape[0], dtype, gated, listed is not None)
    how.constants["STAGES"] = own.stages(how.constants["STAGES"])
    gain, shift, eps = norm_before or (None, None, 0.0)
    product_kernel[how.grid](
        x, own.numbers, own.scales, bias, gain, shift, residual, output, how.partial, how.ticket,
        *((None, None) if listed is None else (listed.rows, listed.count)),
        *fetched(ahead, x.device), rows, output.shape[1], width, how.step, x.stride(0),
        *own.strides, eps, LISTED=listed is not None, **own.constants,
        NORM=norm_kind(norm_before), FORM=FORMS[activation] if activation else "none", GATED=gated,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        **how.constants, **how.options, **overlapped(x.device),
    )  # fmt: skip


_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "erf": functional.gelu,
    "tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "silu": functional.silu,
}


def _wide(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    gated: bool,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The same by PyTorch's product, which rounds to the dtype of the weights before the rest."""
    output = functional.linear(x, weight, bias)
    activated = _TORCH[FORMS[activation] if activation else "none"]
    if gated:
        gate, through = output.chunk(2, dim=-1)
        output = activated(gate) * through
    else:
        output = activated(output)
    return (output if residual is None else residual + output).to(dtype)
