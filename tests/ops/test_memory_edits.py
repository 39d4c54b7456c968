"""Edits of rows of a memory, the token that only the device knows counted in."""

import math

import pytest
import torch

from multiexit_engine.ops import memory_edits
from multiexit_engine.ops.edits import edited_scores
from multiexit_engine.ops.memory_edits import EditLists
from tests.ops.backends import all_backends, device_for, implementation_or_skip

MEMORY, VOCAB, SPARE = 7, 1100, 5
# the rows that are asked for, in no order; others of the memory have edits, too
ROWS = [4, 0, 6, 3]
# by row of the memory: tokens with edits, the latest token
TEXTS = {
    0: ([5, 31, 32, 1099], 32),  # the latest is known
    3: ([], 7),  # and nothing else
    4: (list(range(1050)), 1060),  # more than a program takes at once
    5: ([1, 2], 3),
    6: ([2, 64], -1),  # the host knows the latest
}
ALONE = {4: (1.0, 0.0)}
CASES = pytest.mark.parametrize("are_masked", [False, True], ids=["all allowed", "masked"])


def lists_of(are_masked):
    generator = torch.Generator().manual_seed(0)
    edited, starts, counts = torch.zeros(3, MEMORY, dtype=torch.int32)
    penalties, losses = torch.full((MEMORY,), 2.0), torch.full((MEMORY,), 0.75)
    latest = torch.full((MEMORY,), -1)
    room = sum(len(tokens) for tokens, _ in TEXTS.values()) + SPARE
    listed = torch.full((room, 6), 3, dtype=torch.int32)
    listed[:, 0] = MEMORY
    numbers = torch.randn(room, 4, generator=generator)
    numbers[:, 1] = numbers[:, 1].abs() + 0.5
    numbers[::9, 2] = math.inf
    listed[:, 2:] = numbers.view(torch.int32)
    stop = 0
    for row, (tokens, last) in TEXTS.items():
        start, stop = stop, stop + len(tokens)
        listed[start:stop, 0], listed[start:stop, 1] = row, torch.tensor(tokens, dtype=torch.int32)
        edited[row], starts[row], counts[row] = bool(tokens), start, len(tokens)
        latest[row] = last
        if row in ALONE:
            penalties[row], losses[row] = ALONE[row]
    masks = torch.full((MEMORY,), 2)
    masks[6] = 1
    words = torch.randint(-(2**31), 2**31, (3, -(-VOCAB // 32)), generator=generator).int()
    words[2] = -1
    own = edited, starts, counts, masks, penalties, losses, latest, listed
    return EditLists(*own, words if are_masked else None)


def truth(scores, lists):
    """By loops."""
    scores = scores.clone()
    for place, row in enumerate(ROWS):
        own = {}
        start, count = int(lists.starts[row]), int(lists.counts[row])
        for line in lists.listed[start : start + count]:
            own[int(line[1])] = [float(number) for number in line[2:].view(torch.float32)]
        last = int(lists.latest[row])
        if last >= 0:
            penalty, loss = float(lists.penalties[row]), float(lists.losses[row])
            bias, _, lost, more = own.get(last, [0.0, 0.0, None, 0.0])
            own[last] = [bias, penalty, loss if lost is None else lost + more]
        for token, (bias, penalty, loss, *_) in own.items():
            score = float(scores[place, token]) + bias
            scores[place, token] = (score * penalty if score < 0 else score / penalty) - loss
        if lists.words is not None:
            bits = lists.words[lists.masks[row]].tolist()
            allowed = [bits[token // 32] >> token % 32 & 1 for token in range(VOCAB)]
            scores[place, ~torch.tensor(allowed).bool()] = -math.inf
    return scores


def moved(lists, device):
    return EditLists(*(part if part is None else part.to(device) for part in lists))


def check(function, lists, device):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(len(ROWS), VOCAB, generator=generator, dtype=torch.float64)
    edits = function(torch.tensor(ROWS, device=device), moved(lists, device), VOCAB)
    found = edited_scores(scores.to(device), edits).cpu()
    torch.testing.assert_close(found, truth(scores, lists), rtol=1e-6, atol=1e-6)
    # row 3 has its latest token alone, which changes something
    assert getattr(edits, "is_edited", edits.edited).tolist() == [1, 1, 1, 1]


@CASES
def test_reference_equals_loops(are_masked):
    check(memory_edits.reference, lists_of(are_masked), "cpu")


@all_backends(memory_edits)
@CASES
def test_backend_equals_loops_whatever_memory_holds(backend, are_masked, monkeypatch):
    function, empty = implementation_or_skip(memory_edits, backend), torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(math.nan if made.dtype.is_floating_point else -(2**30) + 1)

    monkeypatch.setattr(torch, "empty", poisoned)
    check(function, lists_of(are_masked), device_for(memory_edits, backend))


@all_backends(memory_edits)
def test_a_row_that_counts_nothing_is_not_edited(backend):
    function, lists = implementation_or_skip(memory_edits, backend), lists_of(False)
    lists.penalties[3], lists.losses[3] = 1.0, 0.0
    device = device_for(memory_edits, backend)
    edits = function(torch.tensor([3], device=device), moved(lists, device), VOCAB)
    scores = torch.randn(1, VOCAB, device=device)
    assert torch.equal(edited_scores(scores, edits), scores)
