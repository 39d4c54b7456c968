"""Requests with a source in one batch: every mode, of both families, in any company and dtype."""

import random
from functools import cache
from pathlib import Path

import pytest
import torch

from multiexit_engine import (
    Contrast,
    DoLa,
    EarlyExit,
    Engine,
    Exit,
    Original,
    SamplingParams,
    SelfSpeculative,
)
from multiexit_engine.cache.paged_kv_cache import PagedKVCache

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = {"bart": GOLDEN / "elmer" / "t1", "t5": GOLDEN / "acd_t5" / "checkpoints" / "t5_layer"}
MODES = [
    Original(),
    Exit(2),
    Contrast("original", 2),
    SelfSpeculative(1, draft_len=3),
    SelfSpeculative(2, draft_len=2, target=Contrast(4, 1)),
    DoLa((1, 2)),
    EarlyExit(0.4, layers=(1, 2, 3)),
    EarlyExit(0.4, layers=(1, 2, 3), kv="copy"),
]
FAMILIES = pytest.mark.parametrize("family", FOLDERS)


def new_engine(family, dtype="float32", **options):
    return Engine.from_pretrained(
        FOLDERS[family],
        architecture=family,
        dtype=dtype,
        device="cpu",
        lm_head_layer_indices=(1, 2, 3, 4),
        vocab_projection_mode="SHARED_PROJECTION_DIRECT",
        **options,
    )


def mixed_requests(kinds=4):
    """Every mode greedy, with beams, sampled, and sampled thrice; the first ``kinds`` of these."""
    draw, requests = random.Random(5), []
    for i in range(kinds * len(MODES)):
        kind, mode = i // len(MODES), MODES[i % len(MODES)]
        params = SamplingParams(
            max_new_tokens=draw.randint(1, 24),
            temperature=0.0 if kind < 2 else 1.5,
            no_repeat_ngram_size=3 if i % 5 == 0 else 0,
            seed=i,
            n=3 if kind == 3 else 1,
            num_beams=3 if kind == 1 else 1,
        )
        if kind == 1 and isinstance(mode, (SelfSpeculative, EarlyExit)):
            mode = Exit(3)
        source = [draw.randrange(3, 400) for _ in range(draw.randint(1, 60))]
        requests.append((source, params, mode))
    return requests


def tokens(output):
    return [completion.token_ids for completion in output.outputs]


def together(engine, requests):
    return [tokens(o) for o in engine.generate(*map(list, zip(*requests, strict=True)))]


def one_by_one(engine, requests):
    return [tokens(engine.generate([p], s, m)[0]) for p, s, m in requests]


@cache
def of_the_reference(family):
    engine = new_engine(family, prefix_caching=False, backend="reference")
    return one_by_one(engine, mixed_requests())


def few_blocks(family):
    """So little memory that the requests cannot all stay."""
    config = new_engine(family).model_config
    shape = config.num_layers, 2, config.num_kv_heads, config.head_dim
    return 90 * PagedKVCache.bytes_per_block(*shape, torch.float32)


@FAMILIES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backend": "reference", "block_size": 5},
        {"block_size": 4, "max_num_batched_tokens": 9, "max_batch_size": 7},
        {"block_size": 2, "kv_cache_memory": few_blocks},
    ],
    ids=["plain", "reference", "few tokens a step", "preempted"],
)
def test_a_batch_gives_each_request_what_it_gets_alone(family, options):
    made = {name: own(family) if callable(own) else own for name, own in options.items()}
    engine = new_engine(family, **made)
    assert together(engine, mixed_requests()) == of_the_reference(family)
    assert engine.stats().num_free_kv_blocks == engine.stats().num_kv_blocks
    assert bool(engine.stats().num_preemptions) == ("kv_cache_memory" in options)
    engine._scheduler.check_integrity()


@FAMILIES
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantization": "int8"}], ids=str)
def test_few_tokens_a_step_change_no_bit_of_what_a_request_gets_alone(family, options):
    pytest.importorskip("multiexit_engine._C", reason="the C++ extension is not built")
    requests = mixed_requests(kinds=2)
    crowded = new_engine(family, max_num_batched_tokens=9, max_batch_size=7, **options)
    assert together(crowded, requests) == one_by_one(new_engine(family, **options), requests)


@FAMILIES
@pytest.mark.parametrize("kind", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_kernels_and_reference_agree_on_quantized_weights(family, kind):
    pytest.importorskip("multiexit_engine._C", reason="the C++ extension is not built")
    requests = mixed_requests(kinds=1)
    native, reference = (
        together(new_engine(family, quantization=kind, backend=backend), requests)
        for backend in ("native", "reference")
    )
    assert native == reference
