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
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from multiexit_engine.kernels import kv, row_lists
from multiexit_engine.kernels.launch import options
from tests.kernels.shipped import DTYPES, Shipped
from tests.kernels.shipped_attention import attentions
from tests.kernels.shipped_dola import differences
from tests.kernels.shipped_exits import exits
from tests.kernels.shipped_heads import heads
from tests.kernels.shipped_layers import POINTERS, layers

PRODUCTS = re.compile(r"mma\.sync\.aligned\.\w+|wgmma\.mma_async|tcgen05\.mma")
OVERLAPS = ("launch_dependents", "prefetch.L2", "griddepcontrol.wait")
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
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


def shipped(capability: int) -> Iterator[Shipped]:
    """Every configuration that a GPU of this capability may be asked to run."""
    overlap = capability >= 90
    yield from (Shipped(*item) for item in exits())
    yield from differences()
    for dtype in DTYPES:
        yield from (Shipped(*item) for item in layers(dtype, overlap))
    yield from heads(overlap)
    yield from attentions(overlap)
    yield Shipped(
        "compact", row_lists.compact_kernel, DTYPES[0], {"BLOCK": row_lists._BLOCK}, options(4)
    )
    yield Shipped(
        "write kv", kv._write_kernel, DTYPES[0], {"WIDTH": 1024, "BLOCK": 1024}, options(4)
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
