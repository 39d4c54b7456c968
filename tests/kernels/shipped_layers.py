"""The layers' kernels as the engine launches them, for the compile test."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from multiexit_engine.kernels import matrices, norms, product_tiles, products, qkv_tiles, rotary
from multiexit_engine.kernels.launch import options

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# product, what it has
PRODUCTS = {
    "plain": {},
    "split": {"SPLITS": 16},
    "bias, gelu": {"HAS_BIAS": True, "FORM": "tanh"},
    "bias, erf": {"HAS_BIAS": True, "FORM": "erf"},
    "bias, residual, split": {"HAS_BIAS": True, "HAS_RESIDUAL": True, "SPLITS": 16},
    "gated": {"GATED": True, "FORM": "silu"},
    "gated, split": {"GATED": True, "FORM": "silu", "SPLITS": 16},
    "listed, bias, erf, split": {
        "LISTED": True, "HAS_BIAS": True, "FORM": "erf", "SPLITS": 16,
    },
    "listed, bias, residual, split": {
        "LISTED": True, "HAS_BIAS": True, "HAS_RESIDUAL": True, "SPLITS": 16,
    },
    "layer norm, bias": {"NORM": "layer", "HAS_BIAS": True},
    "layer norm, bias, gelu, split": {
        "NORM": "layer", "HAS_BIAS": True, "FORM": "tanh", "SPLITS": 16,
    },
    "rms norm, gated, split": {"NORM": "rms", "GATED": True, "FORM": "silu", "SPLITS": 16},
    "rms norm, split": {"NORM": "rms", "SPLITS": 16},
    "rms norm, relu, split": {"NORM": "rms", "FORM": "relu", "SPLITS": 16},
    "rms norm, gated gelu, split": {"NORM": "rms", "GATED": True, "FORM": "tanh", "SPLITS": 16},
    "relu": {"FORM": "relu"},
    "gated gelu": {"GATED": True, "FORM": "tanh"},
}  # fmt: skip


LISTED_CODES = {"LISTED": True, "HAS_BIAS": True, "HAS_RESIDUAL": True}
CODED_ACTIVATION = {"HAS_BIAS": True, "FORM": "erf"}
# what stands before attention, per family: width of a head, the rest
QKV = {
    "gpt2": (64, {"NORM": "layer", "ROTARY": False, "HAS_BIAS": True, "SPLITS": 16}),
    "llama": (128, {"NORM": "rms", "ROTARY": True, "HAS_BIAS": False, "SPLITS": 16}),
    "t5": (64, {"NORM": "rms", "ROTARY": False, "HAS_BIAS": False, "SPLITS": 16}),
    "wide llama": (96, {"NORM": "rms", "ROTARY": True, "HAS_BIAS": True, "SPLITS": 1}),
}
_Item = tuple[str, Any, torch.dtype, dict[str, Any], dict[str, int], dict[str, str]]


def layers(dtype: torch.dtype, overlap: bool) -> Iterator[_Item]:
    """Name, kernel, dtype, constants, options, types of arguments that are not of ``dtype``."""
    begins = {"OVERLAP": overlap, **_without({"ahead_ptr": overlap})}
    for is_layer, listed, rounded in product((True, False), repeat=3):
        constants = {
            "IS_LAYER": is_layer, "LISTED": listed, "ROUNDED": rounded, "OVERLAP": overlap,
            **_without({"shift_ptr": is_layer, "row_ptr": listed, "count_ptr": listed}),
            **_without({"rounded_ptr": rounded}),
        }  # fmt: skip
        name = f"norm layer={is_layer} listed={listed} rounded={rounded}"
        types = {"x_ptr": "*fp32", **({"output_ptr": "*fp32"} if rounded else {})}
        yield name, norms.norm_kernel, dtype, constants, options(4), types
    for rows in (1, 16, 32, 64):
        is_normed = rows == 1 and dtype != torch.float32
        for name, has in PRODUCTS.items():
            if "NORM" not in has or is_normed:
                yield _product(f"product rows={rows} {name}", rows, dtype, has | begins)
        for bits, group in ((8, 32), (8, 64), (4, 32), (4, 64)):
            codes = {"BITS": bits, "GROUP": group, "SPLITS": 16, "STAGES": matrices.CODE_STAGES}
            yield _product(f"product rows={rows} int{bits}-g{group}", rows, dtype, codes | begins)
            name = f"product rows={rows} bias, erf int{bits}-g{group}"
            yield _product(name, rows, dtype, codes | CODED_ACTIVATION | begins)
            name = f"product rows={rows} listed int{bits}-g{group}"
            yield _product(name, rows, dtype, codes | LISTED_CODES | begins)
        numbers = {"BITS": 8, "GROUP": 0, "SPLITS": 16, "STAGES": matrices.FLOAT_STAGES}
        yield _product(f"product rows={rows} fp8", rows, dtype, numbers | begins)
        name = f"product rows={rows} bias, erf fp8"
        yield _product(name, rows, dtype, numbers | CODED_ACTIVATION | begins)
        yield _product(
            f"product rows={rows} listed fp8", rows, dtype, numbers | LISTED_CODES | begins
        )
        for name, (head_dim, has) in QKV.items():
            norm = has["NORM"] if is_normed else "none"
            yield _qkv(
                f"product rows={rows} qkv {name}",
                rows,
                dtype,
                head_dim,
                {**has, **begins, "NORM": norm},
            )
            listed = {**has, **begins, "ahead_ptr": None, "NORM": "none", "LISTED": True}
            yield _qkv(f"product rows={rows} qkv listed {name}", rows, dtype, head_dim, listed)
    for heads, kv_heads, head_dim in ((32, 8, 128), (32, 32, 96), (0, 8, 128)):
        constants = {
            "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim,
            "BLOCK_Q": max(1, heads), "BLOCK_KV": kv_heads, "BLOCK_D": 64,
        }  # fmt: skip
        name = f"rotary heads={heads}/{kv_heads}x{head_dim}"
        yield name, rotary.rotate_and_write_kernel, dtype, constants, options(4), {}


def _tile(rows: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, int]]:
    tile = products.tile_for(rows, dtype)
    constants = {
        "EVEN": 1024 % tile.block_k == 0, "BLOCK_V": tile.block_v, "BLOCK_R": tile.block_r,
        "BLOCK_K": tile.block_k, "STAGES": tile.num_stages,
    }  # fmt: skip
    return constants, options(tile.num_warps, tile.max_registers)


def _without(needed: dict[str, bool]) -> dict[str, None]:
    return {pointer: None for pointer, is_needed in needed.items() if not is_needed}


def _qkv(name: str, rows: int, dtype: torch.dtype, head_dim: int, has: dict[str, Any]) -> _Item:
    tile, launch = _tile(rows, dtype)
    needed = {
        "bias_ptr": has["HAS_BIAS"], "gain_ptr": has["NORM"] != "none",
        "shift_ptr": has["NORM"] == "layer", "position_ptr": has["ROTARY"],
        "cos_ptr": has["ROTARY"], "sin_ptr": has["ROTARY"],
        "partial_ptr": has["SPLITS"] > 1, "ticket_ptr": has["SPLITS"] > 1,
        "row_ptr": has.get("LISTED", False), "count_ptr": has.get("LISTED", False),
    }  # fmt: skip
    types = {"weight_ptr": POINTERS[dtype]}
    if has["NORM"] != "none":
        types["x_ptr"] = "*fp32"
    constants = {"LISTED": False, "HEAD_DIM": head_dim, **has, **tile, **_without(needed)}
    return name, qkv_tiles.qkv_kernel, dtype, constants, launch, types


def _product(name: str, rows: int, dtype: torch.dtype, has: dict[str, Any]) -> _Item:
    tile, launch = _tile(rows, dtype)
    constants = {
        "NORM": "none", "FORM": "none", "GATED": False, "HAS_BIAS": False, "HAS_RESIDUAL": False,
        "SPLITS": 1, "LISTED": False, "BITS": 0, "GROUP": 0, **tile, **has,
    }  # fmt: skip
    needed = {
        "scale_ptr": constants["BITS"] > 0,
        "bias_ptr": constants["HAS_BIAS"],
        "gain_ptr": constants["NORM"] != "none",
        "shift_ptr": constants["NORM"] == "layer",
        "residual_ptr": constants["HAS_RESIDUAL"],
        "partial_ptr": constants["SPLITS"] > 1,
        "ticket_ptr": constants["SPLITS"] > 1,
        "row_ptr": constants["LISTED"],
        "count_ptr": constants["LISTED"],
    }
    stored = {8: "*i8", 4: "*u8"}.get(constants["BITS"], POINTERS[dtype])
    if constants["BITS"] and not constants["GROUP"]:
        stored = "*u8"
    types = {"weight_ptr": stored, "scale_ptr": "*bf16", "residual_ptr": "*fp32"}
    if constants["HAS_RESIDUAL"]:
        types["output_ptr"] = "*fp32"
    if constants["NORM"] != "none":
        types["x_ptr"] = "*fp32"
    constants |= _without(needed)
    return name, product_tiles.product_kernel, dtype, constants, launch, types
