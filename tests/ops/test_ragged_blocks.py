"""Blocks whose rows leave as the device decides: those of ``packed_blocks``, told by lists."""

import pytest
import torch

from multiexit_engine.ops import (
    PackedSources,
    PackedTexts,
    RaggedSources,
    RaggedTexts,
    packed_blocks,
    ragged_blocks,
    use_backend,
)
from tests.ops.backends import all_backends, implementation_or_skip
from tests.ops.test_packed_blocks import (
    LENS,
    READERS,
    SOURCE_LENS,
    models,  # noqa: F401 - a fixture
    ragged,
    run,
)


def starts(lens):
    return torch.tensor([0, *lens]).cumsum(0).int()


def as_lists(hidden, texts, sources):
    """The same texts and sources, as a device knows them; NaN in sources that nobody reads."""
    goes_on = torch.zeros(len(hidden), dtype=torch.bool)
    goes_on[texts.rows] = True
    owners = torch.arange(len(LENS)).repeat_interleave(torch.tensor(LENS))
    keys_values = sources.keys_values.clone()
    for part, count in zip(keys_values.split(SOURCE_LENS), READERS, strict=True):
        if not count:
            part.fill_(torch.nan)
    return (
        RaggedTexts.of(goes_on, starts(LENS), owners),
        RaggedSources(keys_values, starts(SOURCE_LENS), starts(READERS)),
    )


def ragged_run(function, model, hidden, texts, sources, layers=slice(1, 3)):
    with torch.inference_mode():
        return function(hidden, list(model.blocks)[layers], texts, sources)


def test_reference_is_that_of_packed_blocks(models):  # noqa: F811
    model = models(torch.float32)
    args = ragged(model)
    with use_backend("reference"):
        wanted = run(packed_blocks.reference, model, *args)
        found = ragged_run(ragged_blocks.reference, model, args[0], *as_lists(*args))
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@all_backends(ragged_blocks)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backend_is_as_near_to_the_truth_as_the_modules(models, backend, dtype):  # noqa: F811
    function = implementation_or_skip(ragged_blocks, backend)
    model, exact = models(dtype), models(torch.float32).double()
    for own, rounded in zip(exact.parameters(), model.parameters(), strict=True):
        own.data = rounded.data.double()
    hidden, texts, sources = ragged(model)
    wide = PackedSources(sources.keys_values.double(), sources.lens, sources.query_lens)
    with use_backend("reference"):
        truth = run(packed_blocks.reference, exact, hidden.double(), texts, wide)[texts.rows]
        reference = run(packed_blocks.reference, model, hidden, texts, sources)[texts.rows]
    found = ragged_run(function, model, hidden, *as_lists(hidden, texts, sources))
    assert torch.equal(found.isnan(), hidden.isnan())
    own_error = (found[texts.rows].double() - truth).abs().mean()
    assert own_error <= 1.2 * (reference.double() - truth).abs().mean() + 1e-6


@all_backends(ragged_blocks)
def test_rows_that_stay_are_as_they_were(models, backend):  # noqa: F811
    function = implementation_or_skip(ragged_blocks, backend)
    model = models(torch.bfloat16)
    hidden, texts, sources = ragged(model)
    before = hidden.clone()
    found = ragged_run(function, model, hidden, *as_lists(hidden, texts, sources))
    stays = torch.ones(sum(LENS), dtype=torch.bool)
    stays[texts.rows] = False
    assert torch.equal(found[stays].nan_to_num(), hidden[stays].nan_to_num())
    assert torch.equal(hidden.nan_to_num(), before.nan_to_num())


@all_backends(ragged_blocks)
def test_spans_change_no_bit(models, backend):  # noqa: F811
    function = implementation_or_skip(ragged_blocks, backend)
    model = models(torch.bfloat16)
    hidden, *args = ragged(model)
    texts, sources = as_lists(hidden, *args)
    together = ragged_run(function, model, hidden, texts, sources)
    apart = hidden
    for place in range(2):
        span = slice(1 + place, 2 + place)
        one = sources.keys_values[:, place : place + 1]
        read = RaggedSources(one, sources.starts, sources.query_starts)
        apart = ragged_run(function, model, apart, texts, read, span)
    assert torch.equal(apart[args[0].rows], together[args[0].rows])


@all_backends(ragged_blocks)
def test_companions_change_no_bit(models, backend):  # noqa: F811
    function = implementation_or_skip(ragged_blocks, backend)
    model = models(torch.bfloat16)
    hidden, texts, sources = ragged(model)
    lists = as_lists(hidden, texts, sources)
    together = ragged_run(function, model, hidden, *lists)
    # the third text alone, with the second source
    own = (texts.rows >= 6) & (texts.rows < 76)
    goes_on = torch.zeros(70, dtype=torch.bool)
    goes_on[texts.rows[own] - 6] = True
    alone = RaggedTexts.of(goes_on, starts([70]), torch.zeros(70, dtype=torch.int64))
    read = RaggedSources(sources.keys_values[4:70], starts([66]), starts([37]))
    found = ragged_run(function, model, hidden[6:76], alone, read)
    assert torch.equal(found[goes_on], together[texts.rows[own]])


@all_backends(ragged_blocks)
def test_encoder_blocks_read_no_source(models, backend):  # noqa: F811
    function = implementation_or_skip(ragged_blocks, backend)
    model = models(torch.float32)
    hidden = torch.randn(sum(LENS), 48, generator=torch.Generator().manual_seed(0))
    blocks = list(model.encoder.blocks)
    goes_on = torch.ones(sum(LENS), dtype=torch.bool)
    owners = torch.arange(len(LENS)).repeat_interleave(torch.tensor(LENS))
    with torch.inference_mode(), use_backend("reference"):
        wanted = packed_blocks.reference(hidden, blocks, PackedTexts.whole(LENS))
    with torch.inference_mode():
        found = function(hidden, blocks, RaggedTexts.of(goes_on, starts(LENS), owners))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@all_backends(ragged_blocks)
def test_a_first_part_that_is_done_is_not_done_again(models, backend):  # noqa: F811
    function = implementation_or_skip(ragged_blocks, backend)
    model = models(torch.float32)
    hidden, texts, sources = ragged(model)
    lists, blocks = as_lists(hidden, texts, sources), list(model.blocks)[1:3]
    attended = hidden.clone()
    with torch.inference_mode(), use_backend("reference"):
        attended[texts.rows] = blocks[0].attended(hidden, texts)
    with torch.inference_mode():
        # keys and values of the second block are those of the rows as they stay
        found = function(attended, blocks[:1], *lists, True)
        wanted = function(hidden, blocks[:1], *lists)
    torch.testing.assert_close(found[texts.rows], wanted[texts.rows], atol=1e-5, rtol=1e-5)


@all_backends(ragged_blocks)
def test_padding_changes_no_bit(models, backend):  # noqa: F811
    function = implementation_or_skip(ragged_blocks, backend)
    model = models(torch.bfloat16)
    hidden, texts, sources = ragged(model)
    alone, read = as_lists(hidden, texts, sources)
    empty = torch.tensor([len(hidden)] * 3, dtype=torch.int32)
    goes_on = torch.cat([alone.rows.marks(), torch.zeros(30, dtype=torch.bool)])
    owners = torch.arange(len(LENS) + 1).repeat_interleave(torch.tensor([*LENS, 30]))
    padded = RaggedTexts.of(goes_on, torch.cat([alone.starts, empty]), owners)
    nothing = torch.full((30, hidden.shape[1]), torch.nan, dtype=hidden.dtype)
    wanted = ragged_run(function, model, hidden, alone, read)
    found = ragged_run(function, model, torch.cat([hidden, nothing]), padded, _padded(read))
    assert torch.equal(found[texts.rows], wanted[texts.rows])


def _padded(sources):
    """With sources behind the others that have no tokens, and rows of keys that nobody owns."""
    ends = sources.starts[-1:].repeat(3), sources.query_starts[-1:].repeat(3)
    nothing = torch.full_like(sources.keys_values[:5], torch.nan)
    return RaggedSources(
        torch.cat([sources.keys_values, nothing]),
        torch.cat([sources.starts, ends[0]]),
        torch.cat([sources.query_starts, ends[1]]),
    )
