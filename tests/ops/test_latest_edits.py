"""Edits of texts whose last token only the device knows."""

import pytest
import torch

from multiexit_engine.ops.edits import LatestTokens, TokenEdits, edited_scores, with_latest

# a text's tokens count 1 + 0.5 for each time; repeated ones are halved, 4 has a bias
PENALTY, FIRST, MORE, BIAS = 2.0, 1.5, 0.5, 3.0


def edits_of(text):
    """Of rows of counts by token; token 4 always has a number."""
    listed = [(row, token) for row, counts in enumerate(text) for token in {*counts, 4}]
    rows, tokens = torch.tensor(listed).unbind(1)
    times = torch.tensor([text[row].get(token, 0) for row, token in listed]).float()
    is_there = times > 0
    numbers = (
        torch.where(tokens == 4, BIAS, 0.0),
        torch.where(is_there, PENALTY, 1.0),
        torch.where(is_there, FIRST + MORE * (times - 1), 0.0),
    )
    more = torch.where(is_there, MORE, FIRST)
    edited = torch.ones(len(text), dtype=torch.int32)
    return TokenEdits(rows, tokens, *numbers, None, edited), more


@pytest.mark.parametrize("latest", [[2, 4, 7, -1], [3, 3, 3, 3], [-1, -1, -1, -1]], ids=str)
def test_one_more_token_counts_as_if_it_had_been_listed(latest):
    known = [{2: 3, 7: 1}, {2: 1}, {}, {1: 2}]
    longer = [dict(counts) for counts in known]
    for counts, token in zip(longer, latest, strict=True):
        if token >= 0:
            counts[token] = counts.get(token, 0) + 1
    scores = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    edits, more = edits_of(known)
    numbers = torch.full((4,), PENALTY), torch.full((4,), FIRST)
    found = with_latest(edits, LatestTokens(torch.tensor(latest), *numbers, more))
    expected, _ = edits_of(longer)
    torch.testing.assert_close(edited_scores(scores, found), edited_scores(scores, expected))


def test_a_row_that_counts_nothing_is_left_alone():
    edits, more = edits_of([{}])
    none = LatestTokens(torch.tensor([2]), torch.ones(1), torch.zeros(1), torch.zeros_like(more))
    scores = torch.randn(1, 10, generator=torch.Generator().manual_seed(0))
    found = edited_scores(scores, with_latest(edits, none))
    assert torch.equal(found, edited_scores(scores, edits))
