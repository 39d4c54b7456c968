"""Blocks for rows that the device lists: those of ``decoder_blocks`` for these rows alone."""

from dataclasses import replace

import pytest
import torch

from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.models import build_model
from multiexit_engine.ops import (
    ListedRows,
    compact_rows,
    decoder_blocks,
    listed_decoder_blocks,
    use_backend,
)
from tests.models.harness import CASES, CPU, Cache, forward_batch, save, transformers_model
from tests.ops.backends import all_backends, implementation_or_skip

FAMILIES = pytest.mark.parametrize(
    "name", ["gpt2 with every switch", "llama 3", "qwen3 with biases", "gpt_neo in another pattern"]
)
BLOCK_SIZE = 4
# the last text is nobody's: its only block is the spare one
TEXTS = [[5, 17, 99, 3, 3, 42, 0, 61, 8, 7, 1], [9, 8, 7, 2, 1], [4] * 9, [0]]
# text, position: two rows of the first text, which the second of them sees
ROWS = [(0, 9), (0, 10), (1, 4), (2, 8), (2, 7), (3, 0)]
RUNNING, COPIED = [0, 1, 3], [4]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    kept = {}

    def model(name, dtype=torch.float32):
        if name not in kept:
            kept[name] = save(transformers_model(*CASES[name]), folder / name.replace(" ", "_"))
        return build_model(open_checkpoint(kept[name]), CPU, dtype)

    return model


def cache_for(model):
    """A cache with keys and values of everything before the rows, else NaN."""
    cache = Cache.for_texts(model, TEXTS, block_size=BLOCK_SIZE)
    spans = [(0, 9), (0, 4), (0, 7), (0, 1)]
    with torch.inference_mode(), use_backend("reference"):
        batch = forward_batch(cache, spans)
        hidden = model.embed(batch.token_ids, batch.positions)
        decoder_blocks.reference(hidden, list(model.blocks), cache.kv_cache, batch)
    return cache


def one_by_one(cache, rows):
    """Each row as a sequence of its own."""
    sequences = [cache.sequences[text] for text, _ in rows]
    own = Cache(cache.kv_cache, sequences)
    return forward_batch(own, [(at, at + 1) for _, at in rows])


def marks(rows):
    return compact_rows.reference(torch.tensor([row in rows for row in range(len(ROWS))]))


def listed_run(function, model, cache, hidden, running=RUNNING, copied=COPIED, blocks=slice(None)):
    whole = one_by_one(cache, ROWS)
    tables = forward_batch(cache, [(0, len(text)) for text in TEXTS]).layout.block_tables
    batch = replace(whole, layout=replace(whole.layout, block_tables=tables))
    owners = torch.tensor([text for text, _ in ROWS])
    spare = cache.sequences[3].block_table[0] * BLOCK_SIZE + 1
    listed = ListedRows(marks(running), marks(copied) if copied else None, owners, spare)
    with torch.inference_mode():
        return function(hidden, list(model.blocks)[blocks], cache.kv_cache, batch, listed)


def plain_run(model, cache, hidden):
    """The rows alone, with the keys and values that others only give."""
    running, copied = (one_by_one(cache, [ROWS[row] for row in rows]) for rows in (RUNNING, COPIED))
    with torch.inference_mode(), use_backend("reference"):
        for block in model.blocks:
            block.write_kv(hidden[COPIED], cache.kv_cache, copied.positions, copied.slot_mapping)
        return decoder_blocks.reference(
            hidden[RUNNING], list(model.blocks), cache.kv_cache, running
        )


def states(model, dtype=torch.float32):
    """NaN in rows that are in no list."""
    width = model.config.hidden_size
    hidden = torch.randn(len(ROWS), width, generator=torch.Generator().manual_seed(1)).to(dtype)
    for row in set(range(len(ROWS))) - {*RUNNING, *COPIED}:
        hidden[row] = torch.nan
    return hidden


def check(function, model):
    hidden, cache, plain = states(model), cache_for(model), cache_for(model)
    found = listed_run(function, model, cache, hidden)
    wanted = plain_run(model, plain, hidden)
    torch.testing.assert_close(
        found[RUNNING].float(), wanted.float(), atol=2e-5 * float(wanted.abs().max()), rtol=0
    )
    stays = [row for row in range(len(ROWS)) if row not in RUNNING]
    assert torch.equal(found[stays].nan_to_num(), hidden[stays].nan_to_num())
    spare_block = cache.sequences[3].block_table[0]
    for layer in range(model.config.num_layers):
        for find in ("key", "value"):
            own, other = (getattr(each.kv_cache, find)(layer).clone() for each in (cache, plain))
            own[spare_block] = other[spare_block] = 0
            assert torch.equal(own.isnan(), other.isnan())
            torch.testing.assert_close(own, other, atol=2e-4, rtol=1e-4, equal_nan=True)


@FAMILIES
def test_reference_equals_decoder_blocks_of_the_rows_alone(models, name):
    with use_backend("reference"):
        check(listed_decoder_blocks.reference, models(name))


@all_backends(listed_decoder_blocks)
@FAMILIES
def test_backend_equals_decoder_blocks_of_the_rows_alone(models, backend, name):
    check(implementation_or_skip(listed_decoder_blocks, backend), models(name))


@all_backends(listed_decoder_blocks)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backend_is_as_near_to_float32_as_the_modules(models, backend, dtype):
    function = implementation_or_skip(listed_decoder_blocks, backend)
    model, exact = models("llama 3", dtype), models("llama 3")
    for own, rounded in zip(exact.parameters(), model.parameters(), strict=True):
        own.data = rounded.data.float()
    hidden = states(model, dtype)
    truth = plain_run(exact, cache_for(exact), hidden.float())
    reference = plain_run(model, cache_for(model), hidden)
    found = listed_run(function, model, cache_for(model), hidden)[RUNNING]
    own_error = (found.float() - truth).abs().mean()
    assert own_error <= 1.2 * (reference.float() - truth).abs().mean() + 1e-6


@all_backends(listed_decoder_blocks)
def test_companions_and_spans_change_no_bit(models, backend):
    function = implementation_or_skip(listed_decoder_blocks, backend)
    model = models("llama 3", torch.bfloat16)
    hidden = states(model, torch.bfloat16)
    together = listed_run(function, model, cache_for(model), hidden)
    alone = listed_run(function, model, cache_for(model), hidden, running=[3])
    assert torch.equal(alone[3], together[3])
    cache = cache_for(model)
    below = listed_run(function, model, cache, hidden, blocks=slice(1))
    apart = listed_run(function, model, cache, below, blocks=slice(1, None))
    assert torch.equal(apart[RUNNING], together[RUNNING])


@all_backends(listed_decoder_blocks)
def test_a_list_of_nobody_changes_nothing(models, backend):
    function = implementation_or_skip(listed_decoder_blocks, backend)
    model = models("gpt2 with every switch")
    hidden, cache = torch.full_like(states(model), torch.nan), cache_for(model)
    before = cache.kv_cache.key(0).clone()
    found = listed_run(function, model, cache, hidden, running=[], copied=None)
    assert found.isnan().all()
    assert torch.equal(cache.kv_cache.key(0).nan_to_num(), before.nan_to_num())
