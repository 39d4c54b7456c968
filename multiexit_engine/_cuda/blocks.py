"""Spans of decoder blocks in one launch that stays on the device from the first to the last.

Reads the parts of blocks by their names, as the other fronts do; imports none of their classes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from multiexit_engine._cuda.heads import NUMBER_TYPES, current
from multiexit_engine._cuda.layers import (
    ACTIVATIONS,
    Layer,
    LayersCall,
    LayersLibrary,
    LayersPlan,
    Matrix,
    Norm,
)
from multiexit_engine.kernels.launch import kept_scratch

MOST_ROWS = 4
# Asked for behind the layers at most: a part of a large card's L2.
MOST_AHEAD = 16 << 20


class Blocks:
    """The persistent kernel of a build, with the signature of the op. One stream at a time."""

    def __init__(self, library: LayersLibrary) -> None:
        self._library = library
        self._spans: WeakKeyDictionary[Any, dict[tuple[int, int], _Span]] = WeakKeyDictionary()
        self._plans: dict[bytes, LayersPlan] = {}

    def decoder_blocks(
        self, hidden: Tensor, blocks: Sequence[Any], kv_cache: Any, batch: Any, then: Any = None
    ) -> Tensor:
        """See ``multiexit_engine.ops.blocks``; 1 to 4 rows, each of a sequence of its own.

        Blocks are those that ``why_not_served`` finds nothing against. The residual stream is
        float32 between layers, and so is the result.
        """
        layout, device = batch.layout, hidden.device
        hidden = hidden.float().contiguous()
        output = torch.empty_like(hidden)
        with current(device):
            span = self._span(blocks, kv_cache)
            call = span.call_for(len(hidden), layout.block_tables.stride(0))
            plan = self._plan(call)
            kept = kept_scratch("decoder layers", [0.0], -(-self._library.kept_bytes // 4), device)
            scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=device)
            call.hidden, call.output = hidden.data_ptr(), output.data_ptr()
            call.slots, call.positions = batch.slot_mapping.data_ptr(), batch.positions.data_ptr()
            call.contexts = layout.context_lens_device.data_ptr()
            call.block_tables = layout.block_tables.data_ptr()
            call.then, call.then_bytes = _first_bytes(then)
            call.kept, call.scratch = kept.data_ptr(), scratch.data_ptr()
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
            self._library.run(call, plan, stream)
        return output

    def most_rows(self, blocks: Sequence[Any], block_size: int) -> int:
        """How many rows of these blocks their device runs at once; 0: none."""
        call = _shape(blocks, block_size)
        call.table_stride = 1
        with current(blocks[0].attention.qkv.weight.device):
            for call.rows in (MOST_ROWS, 2, 1):
                try:
                    self._library.plan(call)
                except ValueError:
                    continue
                return int(call.rows)
        return 0

    @staticmethod
    def why_not_served(block: Any) -> str | None:
        """What the kernel cannot do of a block; None: it runs it."""
        attention, mlp = block.attention, block.mlp
        linears = [attention.qkv, attention.output, _first(mlp), mlp.down]
        matrices = [linear.weight for linear in linears]
        if not all(isinstance(matrix, Tensor) for matrix in matrices):
            return "its weights are quantized"
        if matrices[0].dtype not in NUMBER_TYPES:
            return f"its weights are {matrices[0].dtype}, not bfloat16 or float16"
        if block.is_post_norm:
            return "its norms stand behind its parts"
        if block.cross_attention is not None:
            return "it reads a source"
        if attention.bias is not None:
            return "its attention has biases for distances"
        if attention.query_norm is not None:
            return "its queries and keys are normed"
        kinds = {hasattr(norm, "bias") for norm in (block.attention_norm, block.mlp_norm)}
        if len(kinds) > 1:
            return "its norms are of two kinds"
        if attention.head_dim % 8 or matrices[0].shape[1] % 8 or matrices[3].shape[1] % 8:
            return "its widths are no multiples of 8"
        if not all(m.is_contiguous() and m.data_ptr() % 16 == 0 for m in matrices):
            return "its matrices do not begin at multiples of 16 bytes"
        return None

    def _span(self, blocks: Sequence[Any], kv_cache: Any) -> _Span:
        spans = self._spans.get(kv_cache)
        if spans is None:
            spans = self._spans[kv_cache] = {}
        # A span keeps its blocks, so their ids stay theirs.
        key = id(blocks[0]), len(blocks)
        if key not in spans:
            spans[key] = _Span(blocks, kv_cache)
        return spans[key]

    def _plan(self, call: LayersCall) -> LayersPlan:
        key = bytes(call)
        if key not in self._plans:
            self._plans[key] = self._library.plan(call)
        return self._plans[key]


class _Span:
    """Blocks with their parts of a cache, listed on the device; keeps both alive."""

    def __init__(self, blocks: Sequence[Any], kv_cache: Any) -> None:
        self._kept = [*blocks]
        layers = (Layer * len(blocks))(*(_layer(block, kv_cache) for block in blocks))
        key = kv_cache.key(blocks[0].attention.layer)
        self._layers = torch.frombuffer(bytearray(bytes(layers)), dtype=torch.uint8).to(key.device)
        self._call = _shape(blocks, key.shape[1])
        self._call.layers = self._layers.data_ptr()

    def call_for(self, rows: int, table_stride: int) -> LayersCall:
        call = LayersCall.from_buffer_copy(self._call)
        call.rows, call.table_stride = rows, table_stride
        return call


def _shape(blocks: Sequence[Any], block_size: int) -> LayersCall:
    """A call but for its rows and addresses; those of the rotation are in it."""
    attention, mlp = blocks[0].attention, blocks[0].mlp
    rotary, head_dim = attention.rotary, attention.head_dim
    return LayersCall(
        cos=0 if rotary is None else rotary.cos.data_ptr(),
        sin=0 if rotary is None else rotary.sin.data_ptr(),
        width=attention.qkv.weight.shape[1],
        heads=attention.widths[0] // head_dim,
        kv_heads=attention.widths[1] // head_dim,
        head_dim=head_dim,
        inner=mlp.down.weight.shape[1],
        num_layers=len(blocks),
        block_size=block_size,
        number_type=NUMBER_TYPES[attention.qkv.weight.dtype],
        activation=ACTIVATIONS[mlp.kind],
        is_gated=hasattr(mlp, "gate_up"),
        has_shift=hasattr(blocks[0].attention_norm, "bias"),
    )


def _layer(block: Any, kv_cache: Any) -> Layer:
    attention, mlp = block.attention, block.mlp
    norms = block.attention_norm, block.mlp_norm
    return Layer(
        (Matrix * 4)(*map(_matrix, (attention.qkv, attention.output, _first(mlp), mlp.down))),
        (Norm * 2)(
            *(Norm(norm.weight.data_ptr(), _address(getattr(norm, "bias", None))) for norm in norms)
        ),
        kv_cache.key(attention.layer).data_ptr(),
        kv_cache.value(attention.layer).data_ptr(),
        attention.window or 0,
        attention.scale,
        (ctypes.c_float * 2)(*(norm.eps for norm in norms)),
    )


def _first_bytes(then: Any) -> tuple[int, int]:
    """Where a matrix, plain or quantized, begins, and how many of its bytes are asked for."""
    if then is None:
        return 0, 0
    numbers = then if isinstance(then, Tensor) else then.codes
    return numbers.data_ptr(), min(numbers.nbytes, MOST_AHEAD)


def _matrix(linear: Any) -> Matrix:
    return Matrix(linear.weight.data_ptr(), _address(linear.bias))


def _first(mlp: Any) -> Any:
    """The layer that a feed-forward layer begins with."""
    gate_up = getattr(mlp, "gate_up", None)
    return mlp.up if gate_up is None else gate_up


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
