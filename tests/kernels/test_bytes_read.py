"""What the contrast reads of memory, counted in the interpreter."""

import math

import pytest
import torch

from tests.kernels.hidden_states import exact_contrast, two_exits

heads = pytest.importorskip("multiexit_engine.kernels.heads")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts")


@pytest.mark.parametrize("rows", [1, 16])
def test_the_upper_head_is_read_once(rows, bytes_read):
    case = two_exits(rows, 1031, 64, torch.bfloat16)
    heads.contrast_tokens(*case.args())
    assert bytes_read(case.upper_weight) == case.upper_weight.nbytes


def test_of_the_lower_head_few_rows_are_read(bytes_read):
    case = two_exits(1, 4000, 64, torch.bfloat16)
    heads.contrast_tokens(*case.args())
    upper = case.upper_hidden.double() @ case.upper_weight.double().T
    plausible = int((upper >= upper.amax() + math.log(0.1)).sum())
    row_bytes = case.lower_weight[0].nbytes
    read = bytes_read(case.lower_weight)
    assert read >= plausible * row_bytes
    # the running threshold starts low: about ln(tiles) times as many rows as in the end
    assert read <= 12 * plausible * row_bytes
    assert read < case.lower_weight.nbytes / 20


def test_flat_distributions_read_each_head_once(bytes_read):
    case = two_exits(16, 300, 64, torch.bfloat16, spread=0.1)
    tokens, _ = heads.contrast_tokens(*case.args())
    assert bytes_read(case.upper_weight) == case.upper_weight.nbytes
    assert bytes_read(case.lower_weight) == case.lower_weight.nbytes
    truth = exact_contrast(case)
    assert (truth.amax(-1) - truth.gather(1, tokens[:, None])[:, 0]).max() < 1e-4
