"""Compiles kernels for GPUs that are not there and prints what came out, one JSON line each.

Run as a program in a process of its own, without the interpreter:
``python -m tests.kernels.compiling CAPABILITY [CAPABILITY ...]``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from multiexit_engine.kernels import (
    attention,
    attention_tiles,
    head_finish,
    head_statistics,
    head_tiles,
    heads,
    kv,
    packed_attention,
    row_lists,
)
from multiexit_engine.kernels.launch import options
from tests.kernels.shipped_exits import exits
from tests.kernels.shipped_layers import POINTERS, layers

PRODUCTS = re.compile(r"mma\.sync\.aligned\.\w+|wgmma\.mma_async|tcgen05\.mma")
OVERLAPS = ("launch_dependents", "prefetch.L2", "griddepcontrol.wait")
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = (torch.bfloat16, torch.float32)
# Arguments that are multiples of 16 for every model we know.
DIVISIBLE = {
    "code_stride",
    "query_width",
    "kv_width",
    "width",
    "split_width",
    "x_stride",
    "query_stride",
    "key_stride",
    "value_stride",
}
TYPES = {
    **dict.fromkeys(("alpha_ptr", "temperature_ptr", "running_ptr", "tile_stat_ptr"), "*fp32"),
    **dict.fromkeys(("candidate_logit_ptr", "candidate_score_ptr", "logprob_ptr"), "*fp32"),
    **dict.fromkeys(("partial_ptr", "weight_ptr", "number_ptr"), "*fp32"),
    **dict.fromkeys(("seed_ptr", "position_ptr", "token_ptr", "slot_ptr"), "*i64"),
    **dict.fromkeys(("count_ptr", "listed_ptr", "tile_token_ptr", "row_ptr", "before_ptr"), "*i32"),
    "flag_ptr": "*u8",
    **dict.fromkeys(("table_ptr", "start_ptr", "context_ptr"), "*i32"),
    **dict.fromkeys(("query_start_ptr", "key_start_ptr", "group_ptr", "ticket_ptr"), "*i32"),
    **dict.fromkeys(("lower_table_ptr", "least_ptr"), "*i64"),
    "entry_ptr": "*i32",
    **dict.fromkeys(("num_candidates_ptr", "edited_ptr", "allowed_ptr", "is_edited_ptr"), "*i32"),
    **dict.fromkeys(("add_ptr", "penalty_ptr", "loss_ptr", "unlikely_ptr", "min_p_ptr"), "*fp32"),
    **dict.fromkeys(("top_k_ptr", "asked_ptr"), "*i32"),
    **dict.fromkeys(("best_id_ptr", "rank_ptr"), "*i64"),
    "best_logprob_ptr": "*fp32",
    **dict.fromkeys(("scale", "eps"), "fp32"),
    "table_row_ptr": "*i64",
}


# What a head whose rows have no lower heads of their own does without.
MIXED = ("lower_table_ptr", "group_ptr")
# What the last kernel does without where no score is edited.
EDITS = (
    "edited_ptr", "entry_ptr", "allowed_ptr", "is_edited_ptr", "add_ptr", "penalty_ptr", "loss_ptr",
)  # fmt: skip
# What a row's draw is narrowed by.
NARROWING = ("top_k_ptr", "unlikely_ptr", "min_p_ptr")
# Where it tells its best tokens.
BEST = ("asked_ptr", "best_id_ptr", "best_logprob_ptr", "rank_ptr")


class HeadKind(NamedTuple):
    """Lower heads of rows; whether scores are edited, draws narrowed, best tokens told."""

    lowers: str
    edited: bool = False
    narrowed: bool = False
    told: bool = False

    @property
    def flags(self) -> dict[str, bool]:
        return {"EDITED": self.edited, "NARROWED": self.narrowed, "TOLD": self.told}

    @property
    def has_all(self) -> bool:
        return self.lowers == "own" and self.edited and (self.narrowed or self.told)

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._asdict().items())


BOTH = (False, True)
HEADS = (
    HeadKind("no"),
    HeadKind("one"),
    *(HeadKind(*kind) for kind in product(("no", "own"), BOTH, BOTH, BOTH) if any(kind[1:])),
    HeadKind("own"),
)


class Shipped(NamedTuple):
    """A kernel as the engine launches it."""

    name: str
    kernel: Any
    dtype: torch.dtype
    constants: dict[str, Any]
    options: dict[str, int]
    types: dict[str, str] = {}


def shipped(capability: int) -> Iterator[Shipped]:
    """Every configuration that a GPU of this capability may be asked to run."""
    overlap = capability >= 90
    yield from (Shipped(*item) for item in exits())
    for dtype in DTYPES:
        yield from (Shipped(*item) for item in layers(dtype, overlap))
        for rows in (1, 16, 32, 64):
            for kind in HEADS:
                yield _head(rows, dtype, kind, overlap)
            yield from (_statistics(rows, dtype, is_listed) for is_listed in (True, False))
        for head_dim in (64, 128):
            yield from (_packed(head_dim, dtype, is_listed) for is_listed in (True, False))
            yield _packed(head_dim, dtype, is_listed=False, reach=128)
        for num_heads, kv_heads, head_dim, window, reach in (
            (16, 16, 64, 0, 0),
            (12, 12, 64, 256, 0),
            (32, 8, 128, 0, 0),
            (20, 4, 96, 0, 0),
            (8, 1, 256, 0, 0),
            (12, 12, 64, 0, 129),
            (32, 32, 128, 0, 129),
        ):
            yield from _attention(dtype, num_heads, kv_heads, head_dim, window, reach, overlap)
    yield from _finishes(overlap)
    yield Shipped(
        "compact", row_lists.compact_kernel, DTYPES[0], {"BLOCK": row_lists._BLOCK}, options(4)
    )
    yield Shipped(
        "write kv", kv._write_kernel, DTYPES[0], {"WIDTH": 1024, "BLOCK": 1024}, options(4)
    )


def _head(rows: int, dtype: torch.dtype, kind: HeadKind, overlap: bool) -> Shipped:
    """The tiles of a head, its rows contrasted with no lower head, with one, or each with its own.

    Where each row has its own the heads have a bias, which takes more registers than none.
    """
    lowers, edited, narrowed, told = kind
    config = heads.head_config(rows, dtype)
    if lowers == "own" or any(kind.flags.values()):
        config = heads.mixed_config(rows, dtype, kind.has_all)
    unused: dict[str, Any] = {
        "no": dict.fromkeys(("bias_ptr", "lower_ptr", "lower_weight_ptr", *MIXED)),
        "one": dict.fromkeys(("bias_ptr", *MIXED)),
        "own": {},
    }[lowers]
    return Shipped(
        f"head rows={rows} {kind}",
        head_tiles.head_kernel,
        dtype,
        {
            **unused,
            **({} if edited else {"edited_ptr": None, "allowed_ptr": None}),
            **({} if narrowed else dict.fromkeys(NARROWING)),
            **({} if told else {"asked_ptr": None}),
            "EVEN": 1024 % config.block_k == 0,
            "HAS_BIAS": lowers == "own",
            "CONTRAST": lowers != "no",
            "MIXED": lowers == "own",
            **kind.flags,
            "BLOCK_V": config.block_v,
            "BLOCK_R": config.block_r,
            "BLOCK_K": config.block_k,
            "STAGES": config.num_stages,
            "OVERLAP": overlap,
        },
        options(config.num_warps, config.max_registers),
    )


def _statistics(rows: int, dtype: torch.dtype, is_listed: bool) -> Shipped:
    config = heads.head_config(rows, dtype)
    return Shipped(
        f"statistics rows={rows} listed={is_listed}",
        head_statistics.statistics_kernel,
        dtype,
        {
            "bias_ptr": None,
            **({} if is_listed else {"row_ptr": None, "count_ptr": None}),
            "LISTED": is_listed,
            "EVEN": 1024 % config.block_k == 0,
            "HAS_BIAS": False,
            "BLOCK_V": config.block_v,
            "BLOCK_R": config.block_r,
            "BLOCK_K": config.block_k,
            "STAGES": config.num_stages,
        },
        options(config.num_warps, config.max_registers),
    )


def _packed(head_dim: int, dtype: torch.dtype, is_listed: bool, reach: int = 0) -> Shipped:
    """Keys and values lie in rows of queries, keys and values."""
    tiles = packed_attention.packed_config(head_dim, dtype)
    tiles = attention.biased(tiles, dtype) if reach else tiles
    return Shipped(
        f"packed heads=16x{head_dim} listed={is_listed} reach={reach}",
        packed_attention.packed_kernel,
        dtype,
        {
            **({} if is_listed else {"row_ptr": None}),
            "LISTED": is_listed,
            **({} if reach else {"bias_ptr": None}),
            "BIAS_SIZE": 2 * reach + 1 if reach else 0,
            "HEADS": 16,
            "KEY_HEADS": 48,
            "HEAD_DIM": head_dim,
            "ONE_PAGE": packed_attention.ONE_PAGE,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_D": head_dim,
            "STAGES": tiles.num_stages,
        },
        options(tiles.num_warps, tiles.max_registers),
    )


def _finishes(overlap: bool) -> Iterator[Shipped]:
    tail = {"TILES": 4096, "OVERLAP": overlap}
    yield Shipped("head finish", head_finish.head_finish_kernel, DTYPES[0], tail, options(4))
    for is_listed in (True, False):
        unlisted: dict[str, Any] = {} if is_listed else {"row_ptr": None, "count_ptr": None}
        yield Shipped(
            f"statistics finish listed={is_listed}",
            head_statistics.statistics_finish_kernel,
            DTYPES[0],
            {"TILES": 4096, "LISTED": is_listed, **unlisted},
            options(4),
        )
    for kind in HEADS[1:]:
        lowers, edited, narrowed, told = kind
        unused = () if edited else EDITS
        unused += () if narrowed else NARROWING
        unused += () if told else BEST
        last_options = heads.finish_config(*kind.flags.values())
        listed = last_options.pop("LISTED")
        unused += () if lowers == "own" else ("group_ptr", "least_ptr")
        yield Shipped(
            f"contrast finish {kind}",
            head_finish.contrast_finish_kernel,
            DTYPES[0],
            {
                **tail,
                **dict.fromkeys(unused),
                "BLOCK_V": 32,
                "LISTED": listed,
                "CONTRAST": lowers != "no",
                "MIXED": lowers == "own",
                "LEAST": lowers == "own",
                **kind.flags,
            },
            last_options,
        )


def _attention(
    dtype: torch.dtype,
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    reach: int,
    overlap: bool,
) -> Iterator[Shipped]:
    group = num_heads // kv_heads
    name = f"heads={num_heads}/{kv_heads}x{head_dim} window={window} reach={reach}"
    shape = {
        "HEAD_DIM": head_dim,
        "WINDOW": window,
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }
    cache = {"HEADS": num_heads, "KV_HEADS": kv_heads, "BLOCK_SIZE": 16, "BIAS_SIZE": reach}
    if not reach:
        cache["bias_ptr"] = None
    short = attention.short_config(group, head_dim, dtype)
    cut = {
        "BLOCK_N": short.block_n,
        "MIN_CHUNK": attention.MIN_CHUNK,
        "MAX_PARTS": attention.MAX_PARTS,
    }
    begins = {"OVERLAP": overlap, **({} if overlap else {"ahead_ptr": None})}
    merged = {"PARTS": 64, "MOST_QUERIES": 16, "OVERLAP": overlap}
    for alone, is_listed in product(BOTH, (False,) if reach else BOTH):
        listed: dict[str, Any] = {"LISTED": is_listed}
        listed |= {} if is_listed else {"row_ptr": None, "count_ptr": None}
        yield Shipped(
            f"short {name} alone={alone} listed={is_listed}",
            attention_tiles.short_kernel,
            dtype,
            {
                **shape,
                **cache,
                **cut,
                **begins,
                **listed,
                **({} if is_listed else {"table_row_ptr": None}),
                **({"ahead_ptr": None} if is_listed else {}),
                **({"weight_ptr": None} if alone else {}),
                "BLOCK_M": short.block_m,
                "STAGES": short.num_stages,
                "ALONE": alone,
            },
            options(short.num_warps, short.max_registers),
            {"partial_ptr": POINTERS[dtype]} if alone else {},
        )
        if not alone:
            yield Shipped(
                f"merge {name} listed={is_listed}",
                attention_tiles.merge_kernel,
                dtype,
                {**shape, **cut, **merged, **listed},
                attention.merge_options(head_dim),
            )
    long = attention.long_config(group, head_dim, dtype)
    long = attention.biased(long, dtype) if reach else long
    yield Shipped(
        f"long {name}",
        attention_tiles.long_kernel,
        dtype,
        {
            **shape,
            **cache,
            "MOST_QUERIES": 16,
            "BLOCK_M": long.block_m,
            "BLOCK_N": long.block_n,
            "STAGES": long.num_stages,
        },
        options(long.num_warps, long.max_registers),
    )


def compiled(item: Shipped, capability: int) -> dict[str, Any]:
    """Registers, stack bytes and shared memory of a kernel; raises if it does not compile."""
    names = item.kernel.arg_names
    types = {**TYPES, **item.types}
    signature = {}
    for name in names:
        default = POINTERS[item.dtype] if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in item.constants else types.get(name, default)
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in item.constants and (name.endswith("_ptr") or name in DIVISIBLE)
    }
    constants = {(names.index(name),): value for name, value in item.constants.items()}
    source = ASTSource(item.kernel, signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=item.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(BINARIES / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert numbers is not None, "cuobjdump reports no registers"
    return {
        "name": f"{item.name} {str(item.dtype)[6:]}",
        "registers": int(numbers[1]),
        "stack": int(numbers[2]),
        "shared": kernel.metadata.shared,
        "products": sorted(set(PRODUCTS.findall(kernel.asm["ptx"]))),
        "moments": kernel.asm["ttgir"].count("isVolatile = true"),
        "overlap": [name for name in OVERLAPS if name in kernel.asm["ptx"]],
    }


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for item in shipped(capability):
            sys.stdout.write(json.dumps({"sm": capability, **compiled(item, capability)}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
