"""Blocks over packed texts of which some rows stay, held against modules and formulas."""

import pytest
import torch

from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.models import build_model
from multiexit_engine.ops import PackedSources, PackedTexts, packed_blocks, use_backend
from tests.models.harness import CPU, ENCODER_DECODERS, save
from tests.models.test_encoder_decoders import transformers_model
from tests.ops.backends import all_backends, implementation_or_skip

LENS, SOURCE_LENS = [5, 1, 70, 3, 8], [4, 66, 9]
QUERY_LENS = [2, 0, 37, 3, 0]  # the first two texts read the first source, and so on
READERS = [2, 40, 0]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Opens the same random BART in any dtype."""
    folder = save(transformers_model(*ENCODER_DECODERS["bart"]), tmp_path_factory.mktemp("bart"))
    return lambda dtype: build_model(open_checkpoint(folder), CPU, dtype)


def rows_that_go_on(generator):
    """Some rows of each text, at random."""
    starts = [sum(LENS[:i]) for i in range(len(LENS))]
    return torch.cat(
        [
            start + torch.randperm(n, generator=generator)[:count].sort().values
            for start, n, count in zip(starts, LENS, QUERY_LENS, strict=True)
        ]
    )


def ragged(model):
    """Arguments: states, texts and sources, NaN in every text of which no row goes on."""
    generator = torch.Generator().manual_seed(4)
    config, dtype = model.config, model.embedding.tokens.dtype
    hidden = torch.randn(sum(LENS), config.hidden_size, generator=generator).to(dtype)
    texts = PackedTexts(LENS, QUERY_LENS, rows_that_go_on(generator))
    for text, part in enumerate(hidden.split(LENS)):
        if text not in texts.alive:
            part.fill_(torch.nan)
    shape = sum(SOURCE_LENS), 4, 2, config.num_kv_heads, config.head_dim
    cross = torch.randn(shape, generator=generator).to(dtype)
    # a span that begins behind the first layer's
    return hidden, texts, PackedSources(cross[:, 1:3], SOURCE_LENS, READERS)


def run(function, model, hidden, texts, sources, layers=slice(1, 3)):
    with torch.inference_mode():
        return function(hidden, list(model.blocks)[layers], texts, sources)


def test_rows_that_stay_are_put_back_after_each_layer(models):
    model = models(torch.float32)
    hidden, texts, sources = ragged(model)
    found = run(packed_blocks.reference, model, hidden, texts, sources)
    stays = torch.ones(sum(LENS), dtype=torch.bool)
    stays[texts.rows] = False
    wanted = hidden
    readers = [5 + 1, 70 + 3, 8]
    for place, block in enumerate(list(model.blocks)[1:3]):
        one = sources.of_block(place)
        whole = PackedSources(one.keys_values, one.lens, readers)
        with torch.inference_mode():
            after = block.packed(wanted, PackedTexts.whole(LENS), whole)
        wanted = torch.where(stays[:, None], wanted, after)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5, equal_nan=True)


@all_backends(packed_blocks)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backend_is_as_near_to_the_truth_as_the_modules(models, backend, dtype):
    function = implementation_or_skip(packed_blocks, backend)
    model, exact = models(dtype), models(torch.float32).double()
    for own, rounded in zip(exact.parameters(), model.parameters(), strict=True):
        own.data = rounded.data.double()
    hidden, texts, sources = ragged(model)
    wide = PackedSources(sources.keys_values.double(), sources.lens, sources.query_lens)
    with use_backend("reference"):
        truth = run(packed_blocks.reference, exact, hidden.double(), texts, wide)[texts.rows]
        reference = run(packed_blocks.reference, model, hidden, texts, sources)[texts.rows]
    found = run(function, model, hidden, texts, sources)
    assert torch.equal(found.isnan(), hidden.isnan())
    own_error = (found[texts.rows].double() - truth).abs().mean()
    assert own_error <= 1.2 * (reference.double() - truth).abs().mean() + 1e-6


@all_backends(packed_blocks)
def test_encoder_blocks_equal_the_modules(models, backend):
    function = implementation_or_skip(packed_blocks, backend)
    model = models(torch.float32)
    hidden = torch.randn(sum(LENS), 48, generator=torch.Generator().manual_seed(0))
    args = hidden, list(model.encoder.blocks), PackedTexts.whole(LENS)
    with torch.inference_mode():
        found = function(*args)
        with use_backend("reference"):
            wanted = packed_blocks.reference(*args)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@all_backends(packed_blocks)
def test_a_first_part_that_is_done_is_not_done_again(models, backend):
    function = implementation_or_skip(packed_blocks, backend)
    model = models(torch.float32)
    hidden, _, sources = ragged(model)
    hidden = torch.nan_to_num(hidden)
    texts, whole = (
        PackedTexts.whole(LENS),
        PackedSources(sources.keys_values, SOURCE_LENS, [6, 73, 8]),
    )
    blocks = list(model.blocks)[1:3]
    with torch.inference_mode():
        attended = blocks[0].attended(hidden, texts)
        found = function(attended, blocks, texts, whole, True)
        wanted = function(hidden, blocks, texts, whole)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@all_backends(packed_blocks)
def test_spans_and_companions_change_no_bit(models, backend):
    function = implementation_or_skip(packed_blocks, backend)
    model = models(torch.float32)
    hidden, texts, sources = ragged(model)
    together = run(function, model, hidden, texts, sources)
    apart = hidden
    for place in range(2):
        span = slice(1 + place, 2 + place)
        apart = run(function, model, apart, texts, sources.of_block(place), span)
    assert torch.equal(apart[texts.rows], together[texts.rows])
    # the third text alone, with the second source
    own = (texts.rows >= 6) & (texts.rows < 76)
    alone = PackedTexts([70], [37], texts.rows[own] - 6)
    read = PackedSources(sources.keys_values[4:70], [66], [37])
    found = run(function, model, hidden[6:76], alone, read)
    assert torch.equal(found[alone.rows], together[texts.rows[own]])
