"""Fused heads whose matrices are codes: what they give of the dequantized ones, in float64."""

from dataclasses import replace

import pytest
import torch

from multiexit_engine.ops import (
    contrast_tokens,
    head_statistics,
    head_tokens,
    shared_head_tokens,
)
from multiexit_engine.ops.contrast import contrast_logits
from multiexit_engine.ops.edits import TokenEdits
from multiexit_engine.ops.heads import statistics_of_logits
from multiexit_engine.ops.tokens import RowGroup
from multiexit_engine.quantization import Quantization, dequantize, quantize
from tests.kernels.hidden_states import assert_chosen, exact_contrast, exact_head, two_exits
from tests.ops.backends import device_for, implementation_or_skip

NAMES = pytest.mark.parametrize("name", ["int8", "int8-g64", "int4", "int4-g64", "fp8"])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def coded_case(name, dtype, rows=5, vocab=77, width=72, **more):
    """States and two quantized heads; the same with the numbers that these stand for."""
    case = two_exits(rows, vocab, width, dtype, **more)
    kind = Quantization.parse(name)
    upper, lower = (quantize(each.float(), kind) for each in (case.upper_weight, case.lower_weight))
    plain = replace(
        case,
        upper_weight=dequantize(upper, torch.float64),
        lower_weight=dequantize(lower, torch.float64),
    )
    return case, plain, upper, lower


def on_triton(op):
    return implementation_or_skip(op, "triton"), device_for(op, "triton")


def moved(device, *parts):
    return [part.to(device) if isinstance(part, torch.Tensor) else part for part in parts]


def weight_on(device, weight):
    return replace(weight, codes=weight.codes.to(device), scales=weight.scales.to(device))


@NAMES
@TYPES
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_are_those_of_the_dequantized_head(name, dtype, temperature):
    function, device = (
        implementation_or_skip(head_tokens, "triton"),
        device_for(head_tokens, "triton"),
    )
    case, plain, upper, _ = coded_case(name, dtype, temperature=temperature)
    bias = torch.linspace(-1, 1, 77)
    drawing = moved(device, case.temperature, case.seeds, case.positions)
    hidden, shift = moved(device, case.upper_hidden, bias.to(dtype))
    found = function(hidden, weight_on(device, upper), shift, *drawing)
    assert_chosen(found, exact_head(plain, bias.to(dtype)), case, 2e-5)


@NAMES
@TYPES
@pytest.mark.parametrize("spread", [4.0, 0.05])
def test_contrasts_are_those_of_the_dequantized_heads(name, dtype, spread):
    function, device = (
        implementation_or_skip(contrast_tokens, "triton"),
        device_for(contrast_tokens, "triton"),
    )
    case, plain, upper, lower = coded_case(name, dtype, spread=spread)
    hidden, lower_hidden = moved(device, case.upper_hidden, case.lower_hidden)
    drawing = moved(device, case.alpha, case.temperature, case.seeds, case.positions)
    found = function(
        hidden, weight_on(device, upper), lower_hidden, weight_on(device, lower), *drawing
    )
    assert_chosen(found, exact_contrast(plain), case, 2e-5)


@NAMES
@TYPES
def test_rows_of_all_kinds_share_a_quantized_head(name, dtype):
    """Two alone, two against one lower head, one against the shared head itself, with edits."""
    function, device = (
        implementation_or_skip(shared_head_tokens, "triton"),
        device_for(shared_head_tokens, "triton"),
    )
    case, plain, upper, lower = coded_case(name, dtype)
    head = weight_on(device, upper)
    lower_hidden = case.lower_hidden.to(device)
    groups = [
        RowGroup(2),
        RowGroup(2, lower_hidden[2:4], weight_on(device, lower)),
        RowGroup(1, lower_hidden[4:], head),
    ]
    upper_logits = plain.upper_hidden.double() @ plain.upper_weight.T
    states = plain.lower_hidden.double()
    lower_logits = torch.cat((states[:4] @ plain.lower_weight.T, states[4:] @ plain.upper_weight.T))
    exact = contrast_logits.reference(upper_logits, lower_logits, case.alpha)
    exact[:2] = upper_logits[:2].log_softmax(-1)
    best = exact[0].argmax()
    exact_after = exact.clone()
    exact_after[0, best] = -torch.inf
    nothing, edited = torch.zeros(1), torch.tensor([1, 0, 0, 0, 0], dtype=torch.int32)
    ban = nothing, nothing + 1, nothing + torch.inf
    edits = TokenEdits(torch.tensor([0]), best[None], *ban, None, edited)
    rest = moved(device, case.alpha, None, case.temperature, case.seeds, case.positions)
    hidden = case.upper_hidden.to(device)
    for own, wanted in ((None, exact), (TokenEdits(*moved(device, *edits)), exact_after)):
        found = function(hidden, head, None, groups, *rest, edits=own)
        assert_chosen(found, wanted, case, 2e-5)


@NAMES
@TYPES
@pytest.mark.parametrize("shortlist", [None, 40])
def test_statistics_are_those_of_the_dequantized_head(name, dtype, shortlist):
    function, device = (
        implementation_or_skip(head_statistics, "triton"),
        device_for(head_statistics, "triton"),
    )
    case, plain, upper, _ = coded_case(name, dtype)
    found = function(case.upper_hidden.to(device), weight_on(device, upper), None, shortlist)
    logits = plain.upper_hidden.double() @ plain.upper_weight.T
    wanted = statistics_of_logits(logits[:, :shortlist])
    assert found.tokens.tolist() == wanted.tokens.tolist()
    for mine, exact in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(mine.cpu().double(), exact, atol=5e-5, rtol=0)


@NAMES
def test_rows_behind_the_vocabulary_are_not_read(name):
    """Rows behind the vocabulary, as the NaN of their scales would show."""
    function, device = on_triton(head_statistics)
    case, plain, upper, _ = coded_case(name, torch.float32)
    scales = torch.full((77 + 40, upper.scales.shape[1]), torch.nan, dtype=torch.bfloat16)
    scales[:77] = upper.scales
    codes = torch.full((77 + 40, upper.codes.shape[1]), 127, dtype=upper.codes.dtype)
    codes[:77] = upper.codes
    weight = weight_on(device, replace(upper, codes=codes, scales=scales))
    weight = replace(weight, codes=weight.codes[:77], scales=weight.scales[:77])
    found = function(case.upper_hidden.to(device), weight)
    wanted = statistics_of_logits(plain.upper_hidden.double() @ plain.upper_weight.T)
    torch.testing.assert_close(found.entropy.cpu().double(), wanted.entropy, atol=5e-5, rtol=0)
