"""Which blocks the persistent kernel takes, and what it says of the others."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from multiexit_engine._cuda.blocks import Blocks
from multiexit_engine._cuda.layers import LayersCall
from tests.cuda.random_layers import Shape, layers

GPT2 = Shape(windows=(None,))


def block_with(**changes):
    [block] = layers(GPT2, [2]).blocks
    for path, value in changes.items():
        *parts, name = path.split("__")
        owner = block
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, name, value)
    return block


LLAMA = GPT2.llama()


@pytest.mark.parametrize("shape", [GPT2, LLAMA, replace(LLAMA, has_bias=True)], ids=str)
def test_gpt_and_llama_are_served(shape):
    assert Blocks.why_not_served(layers(shape, [2]).blocks[0]) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mlp__down__weight": object()}, "its weights are quantized"),
        ({"is_post_norm": True}, "its norms stand behind its parts"),
        ({"cross_attention": object()}, "it reads a source"),
        ({"attention__bias": object()}, "its attention has biases for distances"),
        ({"attention__query_norm": object()}, "its queries and keys are normed"),
        ({"attention__head_dim": 12}, "its widths are no multiples of 8"),
        ({"mlp_norm": SimpleNamespace()}, "its norms are of two kinds"),
        ({"attention__qkv__weight": torch.zeros(144, 48)}, "not bfloat16 or float16"),
        ({"mlp__up__weight": torch.zeros(3457, dtype=torch.float16)[1:].view(72, 48)},
         "do not begin at multiples of 16 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_blocks_are_told_why(changes, reason):
    assert reason in Blocks.why_not_served(block_with(**changes))


@pytest.mark.parametrize(
    ("inner", "shared_kib", "rows"), [(72, 227, 4), (12800, 163, 2), (26000, 150, 1), (72, 8, 0)]
)
def test_as_many_rows_run_as_fit_the_shared_memory(ring, inner, shared_kib, rows):
    own = ring.shaped(shared_kib=shared_kib).blocks
    assert own.most_rows(layers(replace(GPT2, inner=inner), [2]).blocks, 4) == rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 5}, "rows must be 1 to 4"),
        ({"width": 44}, "widths must be multiples of 8"),
        ({"num_layers": 513}, "layers at most 512"),
        ({"number_type": 3}, "numbers must be bfloat16 or float16"),
        ({}, "an address is missing"),
    ],
)
def test_a_call_that_the_kernel_does_not_run_is_refused(ring, changes, message):
    values = {
        "rows": 1, "width": 48, "heads": 6, "kv_heads": 6, "head_dim": 8, "inner": 72,
        "num_layers": 1, "block_size": 4, "table_stride": 1, "number_type": 1,
    }  # fmt: skip
    call, library = LayersCall(**(values | changes)), ring.blocks._library
    with pytest.raises(ValueError, match=message):
        library.run(call, library.plan(call), 0)
