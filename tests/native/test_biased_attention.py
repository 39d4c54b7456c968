"""Attention with a bias for distances, on every instruction set, NaN in all that nobody owns."""

import math

import pytest
import torch

from multiexit_engine._native import biased_packed_attention, biased_paged_attention
from multiexit_engine.batch import SequenceLayout
from multiexit_engine.ops import biased_packed_attention as packed_op
from tests.ops.paged import biased_attention_truth, paged_batch

LENS = [7, 1, 130]
REACHES = pytest.mark.parametrize("reach", [1, 30, 129])


def biases(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def paged(batch, bias, layout=None, rows=slice(None)):
    return biased_paged_attention(
        batch.query[rows], batch.key_cache, batch.value_cache, layout or batch.layout, 1.0, bias
    )


def operands(head_dim, dtype=torch.float32):
    """Packed rows, with NaN behind the last text's."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, sum(LENS), 2, head_dim, generator=generator).to(dtype)
    room = torch.full((3, sum(LENS) + 9, 2, head_dim), math.nan, dtype=dtype)
    room[:, : sum(LENS)] = rows
    return list(room[:, : sum(LENS)])


@REACHES
@pytest.mark.parametrize("head_dim", [1, 12, 64, 80])
def test_paged_equals_the_formula(isa, reach, head_dim):
    batch = paged_batch(
        [1, 9, 2, 63], [300, 9, 31, 100], num_heads=3, num_kv_heads=3, head_dim=head_dim
    )
    bias = biases(3, reach)
    truth = biased_attention_truth(batch, 1.0, bias)
    torch.testing.assert_close(paged(batch, bias).double(), truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_paged_half_precision_equals_the_formula(isa, dtype):
    batch = paged_batch([5, 1], [12, 300], num_heads=2, num_kv_heads=2, head_dim=48, dtype=dtype)
    bias = biases(2, 30)
    truth = biased_attention_truth(batch, 1.0, bias)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(paged(batch, bias).double(), truth, atol=eps, rtol=eps)


@REACHES
def test_a_token_is_the_same_alone_as_in_any_chunk_of_its_prompt(isa, threads, reach):
    batch = paged_batch([150], [300], num_heads=3, num_kv_heads=3, head_dim=20)
    bias = biases(3, reach)
    whole = paged(batch, bias)
    for first, stop in [(0, 1), (5, 9), (64, 150), (106, 107), (149, 150)]:
        part = SequenceLayout(
            query_lens=(stop - first,),
            context_lens=(150 + stop,),
            cu_query_lens=torch.tensor([0, stop - first], dtype=torch.int32),
            context_lens_device=torch.tensor([150 + stop], dtype=torch.int32),
            block_tables=batch.layout.block_tables,
        )
        alone = paged(batch, bias, part, slice(first, stop))
        assert torch.equal(alone, whole[first:stop])


@pytest.mark.parametrize("reach", [0, 30, 200])
@pytest.mark.parametrize("head_dim", [1, 12, 64])
def test_packed_equals_the_formula(isa, reach, head_dim):
    rows, bias = operands(head_dim), biases(2, 2 * reach + 1)
    found = biased_packed_attention(*rows, LENS, 1.0, bias).double()
    truth = packed_op.reference(*(x.double() for x in rows), LENS, 1.0, bias.double())
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=0)


def test_a_packed_text_is_the_same_beside_any_others(isa, threads):
    rows, bias = operands(20), biases(2, 61)
    together = biased_packed_attention(*rows, LENS, 1.0, bias)
    alone = biased_packed_attention(*(x[:7] for x in rows), LENS[:1], 1.0, bias)
    assert torch.equal(alone, together[:7])
