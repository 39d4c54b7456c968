"""Blocks of encoders and of decoders with sources on quantized matrices, read as codes."""

import pytest
import torch
from torch import nn

from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.layers.linear import Linear
from multiexit_engine.models import build_model
from multiexit_engine.ops import (
    PackedSources,
    PackedTexts,
    assume_device,
    packed_blocks,
    ragged_blocks,
    use_backend,
)
from multiexit_engine.quantization import Quantization, QuantizedWeight, dequantize
from tests.models.harness import CPU, ENCODER_DECODERS, save
from tests.models.test_encoder_decoders import (
    SOURCES,
    encode,
    run_in_chunks,
    transformers_model,
)
from tests.ops.test_packed_blocks import ragged, run
from tests.ops.test_ragged_blocks import as_lists, ragged_run

kernels = pytest.importorskip("multiexit_engine.kernels.packed_blocks")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors are the CPU's")

slow = pytest.mark.slow
KINDS = pytest.mark.parametrize(
    "name", ["int8", *(pytest.param(name, marks=slow) for name in ("int4-g64", "fp8"))]
)
FAMILIES = pytest.mark.parametrize(
    "family", ["bart", pytest.param("t5 gated and untied", marks=slow)]
)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=slow)], ids=str
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Opens random models, quantized, and the same in float64 on the numbers that codes mean."""
    folders = {}

    def opened(family, name, dtype):
        if family not in folders:
            theirs = transformers_model(*ENCODER_DECODERS[family])
            folders[family] = save(theirs, tmp_path_factory.mktemp("checkpoint"))
        args = open_checkpoint(folders[family]), CPU, dtype, Quantization.parse(name)
        return build_model(*args), as_numbers(build_model(*args))

    return opened


def as_numbers(model):
    for module in model.modules():
        if isinstance(module, Linear) and isinstance(module.weight, QuantizedWeight):
            module.weight = nn.Parameter(dequantize(module.weight, torch.float64))
    return model.double()


def assert_as_near(found, reference, truth):
    """To the truth as the modules are."""
    own, other = ((x.double() - truth).abs().mean() for x in (found, reference))
    assert own <= 1.2 * other + 1e-6


@KINDS
@FAMILIES
@DTYPES
def test_both_stacks_are_as_near_to_the_numbers_as_the_modules(models, family, name, dtype):
    model, exact = models(family, name, dtype)
    with use_backend("reference"):
        truth = [encode(exact, SOURCES[:2]), *run_in_chunks(exact, 4, [1])]
        modules = [encode(model, SOURCES[:2]), *run_in_chunks(model, 4, [1])]
    with assume_device("cuda"):
        found = [encode(model, SOURCES[:2]), *run_in_chunks(model, 4, [1])]
    for own, other, wanted in zip(found, modules, truth, strict=True):
        assert_as_near(own, other, wanted)


@KINDS
@DTYPES
@pytest.mark.parametrize("kind", ["packed", "ragged"])
def test_rows_that_stay_are_passed_over(models, name, dtype, kind):
    model, exact = models("bart", name, dtype)
    hidden, texts, sources = args = ragged(model)
    wide = PackedSources(sources.keys_values.double(), sources.lens, sources.query_lens)
    with use_backend("reference"):
        truth = run(packed_blocks.reference, exact, hidden.double(), texts, wide)
        reference = run(packed_blocks.reference, model, *args)
    if kind == "packed":
        found = run(packed_blocks.implementation("triton"), model, *args)
    else:
        function = ragged_blocks.implementation("triton")
        found = ragged_run(function, model, hidden, *as_lists(*args))
    assert torch.equal(found.isnan(), hidden.isnan())
    rows = texts.rows
    assert_as_near(found[rows], reference[rows], truth[rows])
    stays = torch.ones(len(hidden), dtype=torch.bool)
    stays[rows] = False
    assert torch.equal(found[stays].nan_to_num(), hidden[stays].float().nan_to_num())


@KINDS
def test_a_row_has_the_same_bits_in_one_span_and_in_two(models, name):
    model, _ = models("bart", name, torch.bfloat16)
    hidden, texts, sources = ragged(model)
    function = packed_blocks.implementation("triton")
    together = run(function, model, hidden, texts, sources)
    for place in range(2):
        hidden = run(
            function, model, hidden, texts, sources.of_block(place), slice(1 + place, 2 + place)
        )
    assert torch.equal(hidden.nan_to_num(), together.nan_to_num())


@KINDS
def test_codes_are_read_once(models, name, bytes_read):
    model, _ = models("bart", name, torch.bfloat16)
    blocks = list(model.encoder.blocks)
    hidden = torch.randn(13, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        packed_blocks.implementation("triton")(hidden, blocks, PackedTexts.whole([4, 9]))
    for block in blocks:
        for linear in (block.attention.qkv, block.attention.output, block.mlp.up, block.mlp.down):
            codes, columns = linear.weight.codes, linear.weight.columns
            # fp8's padding is not read
            assert bytes_read(codes) in (codes.nbytes, codes.shape[0] * columns)
