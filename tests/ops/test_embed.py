"""Embeddings are bit by bit those of PyTorch."""

import pytest
import torch
from torch.nn.functional import embedding

from multiexit_engine.ops import embed
from tests.ops.backends import all_backends, implementation_or_skip


def operands(count, width):
    generator = torch.Generator().manual_seed(count)
    tokens, places = (torch.randn(n, width, generator=generator) for n in (31, 17))
    token_ids, positions = (torch.randint(0, n, (count,), generator=generator) for n in (31, 17))
    return token_ids, positions, tokens, places


@all_backends(embed)
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize(("count", "width"), [(0, 3), (1, 1), (7, 33), (100, 63)])
def test_equal_those_of_pytorch(backend, scale, count, width):
    function = implementation_or_skip(embed, backend)
    token_ids, positions, tokens, places = operands(count, width)
    wanted = embedding(token_ids, tokens) * scale + embedding(positions, places)
    for op in (function, embed.reference):
        assert torch.equal(op(token_ids, positions, tokens, places, scale), wanted)


@all_backends(embed)
@pytest.mark.parametrize(("token", "position"), [(31, 0), (-1, 0), (0, 17), (0, -1)])
def test_what_no_table_has_is_an_error(backend, token, position):
    function = implementation_or_skip(embed, backend)
    _, _, tokens, places = operands(1, 4)
    with pytest.raises(IndexError):
        function(torch.tensor([token]), torch.tensor([position]), tokens, places, 1.0)


def test_half_precision_is_rounded_as_by_pytorch():
    token_ids, positions, tokens, places = operands(9, 33)
    tokens, places = tokens.bfloat16(), places.bfloat16()
    wanted = embedding(token_ids, tokens) * 0.3 + embedding(positions, places)
    assert torch.equal(embed(token_ids, positions, tokens, places, 0.3), wanted)
