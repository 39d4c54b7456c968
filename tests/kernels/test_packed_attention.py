import math

import pytest
import torch

from multiexit_engine import ops

kernels = pytest.importorskip("multiexit_engine.kernels.packed_attention")
packed_attention = kernels.packed_attention

# query lengths, key lengths, heads, width: encoder, cross-attention, sequences without queries
CASES = [
    ([9], [9], 2, 16),
    ([70, 0, 1, 33], [130, 3, 1, 97], 3, 20),
    ([1, 100], [203, 7], 1, 64),
]


def operands(query_lens, key_lens, heads, width, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = sum(query_lens), sum(key_lens), sum(key_lens)
    return [torch.randn(n, heads, width, generator=generator).to(dtype) for n in rows]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_equals_the_formula(case, dtype, tolerance, device):
    query_lens, key_lens, heads, width = case
    inputs = operands(*case, dtype)
    wide = [each.double() for each in inputs]
    truth = ops.packed_attention.reference(*wide, query_lens, key_lens, 0.3)
    found = packed_attention(*(each.to(device) for each in inputs), query_lens, key_lens, 0.3)
    assert ((found.cpu().double() - truth).norm() / truth.norm()).item() < tolerance


def test_what_lies_beside_the_keys_is_not_read(device):
    query, key, value = operands([5, 4], [40, 20], 2, 16, torch.float32)
    key[40:], value[40:] = math.nan, math.nan
    inputs = [each.to(device) for each in (query, key, value)]
    found = packed_attention(*inputs, [5, 4], [40, 20], 0.3)
    assert found[:5].isfinite().all() and found[5:].isnan().all()


def test_fused_operands_are_read_where_they_lie(device):
    query, key, value = operands([9], [9], 2, 16, torch.float32)
    fused = torch.cat([query, key, value], 1).to(device)
    parts = fused.split(2, 1)
    expected = packed_attention(*(part.contiguous() for part in parts), [9], [9], 0.3)
    assert torch.equal(packed_attention(*parts, [9], [9], 0.3), expected)


def test_keys_are_read_amid_the_columns_of_wider_rows(device):
    query, key, value = operands([5, 4], [40, 20], 2, 16, torch.float32)
    wide = torch.full((60, 5, 2, 2, 16), math.nan)
    wide[:, 3, 0], wide[:, 3, 1] = key, value
    columns = wide.to(device)[:, 3].unbind(1)
    expected = packed_attention(*(x.to(device) for x in (query, key, value)), [5, 4], [40, 20], 0.3)
    assert torch.equal(
        packed_attention(query.to(device), *columns, [5, 4], [40, 20], 0.3), expected
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_no_number_of_sequences_wants_a_kernel_of_its_own(count, device):
    """Triton compiles kernels anew for pointers that are no multiples of 16 bytes."""
    starts = kernels.PackedStarts.of([2] * count, [3] * count, torch.device(device))
    assert [each.data_ptr() % 16 for each in starts] == [0, 0]
    assert [len(each) for each in starts] == [count + 1] * 2


def test_a_sequence_does_not_know_its_batch_mates(device):
    inputs = [each.to(device) for each in operands([70, 8], [70, 8], 2, 16, torch.float32)]
    together = packed_attention(*inputs, [70, 8], [70, 8], 0.3)
    alone = packed_attention(*(each[70:] for each in inputs), [8], [8], 0.3)
    assert torch.equal(together[70:], alone)
