"""The layers' kernels as the engine launches them, for the compile test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from multiexit_engine.kernels import norms, product_tiles, products
from multiexit_engine.kernels.launch import options

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
WIDE = {"output_ptr": "*fp32"}
# product, what it has
PRODUCTS = {
    "plain": {},
    "split": {"SPLIT": True},
    "bias, gelu": {"HAS_BIAS": True, "FORM": "tanh"},
    "bias, erf": {"HAS_BIAS": True, "FORM": "erf"},
    "bias, residual, split": {"HAS_BIAS": True, "HAS_RESIDUAL": True, "SPLIT": True},
    "gated": {"GATED": True, "FORM": "silu"},
    "gated, split": {"GATED": True, "FORM": "silu", "SPLIT": True},
    "layer norm, bias": {"NORM": "layer", "HAS_BIAS": True},
    "layer norm, bias, gelu, split": {
        "NORM": "layer", "HAS_BIAS": True, "FORM": "tanh", "SPLIT": True,
    },
    "rms norm, gated, split": {"NORM": "rms", "GATED": True, "FORM": "silu", "SPLIT": True},
}  # fmt: skip


def layers(dtype: torch.dtype) -> Iterator[tuple[str, Any, Any, Any, Any, dict[str, str]]]:
    """Name, kernel, dtype, constants, options, types of arguments that are not of ``dtype``."""
    for is_layer in (True, False):
        constants = {"IS_LAYER": is_layer, **({} if is_layer else {"shift_ptr": None})}
        name = f"norm layer={is_layer}"
        yield name, norms.norm_kernel, dtype, constants, options(4), {"x_ptr": "*fp32"}
    for rows in (1, 16, 32, 64):
        for name, has in PRODUCTS.items():
            if "NORM" not in has or (rows == 1 and dtype != torch.float32):
                yield from _product(f"product rows={rows} {name}", rows, dtype, has)


def _product(
    name: str, rows: int, dtype: torch.dtype, has: dict[str, Any]
) -> Iterator[tuple[str, Any, Any, Any, Any, dict[str, str]]]:
    tile = products.tile_for(rows, dtype)
    constants = {
        "NORM": "none", "FORM": "none", "GATED": False, "HAS_BIAS": False, "HAS_RESIDUAL": False,
        "SPLIT": False, "EVEN": 1024 % tile.block_k == 0, "BLOCK_V": tile.block_v,
        "BLOCK_R": tile.block_r, "BLOCK_K": tile.block_k, "STAGES": tile.num_stages, **has,
    }  # fmt: skip
    needed = {
        "bias_ptr": constants["HAS_BIAS"],
        "gain_ptr": constants["NORM"] != "none",
        "shift_ptr": constants["NORM"] == "layer",
        "residual_ptr": constants["HAS_RESIDUAL"],
        "partial_ptr": constants["SPLIT"],
        "ticket_ptr": constants["SPLIT"],
    }
    constants |= {pointer: None for pointer, is_needed in needed.items() if not is_needed}
    types = {"weight_ptr": POINTERS[dtype], "residual_ptr": "*fp32"}
    if constants["HAS_RESIDUAL"]:
        types |= WIDE
    if constants["NORM"] != "none":
        types["x_ptr"] = "*fp32"
    yield (
        name,
        product_tiles.product_kernel,
        dtype,
        constants,
        options(tile.num_warps, tile.max_registers),
        types,
    )
