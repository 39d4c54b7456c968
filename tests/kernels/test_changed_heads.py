"""Heads that edit, narrow and tell best tokens: orders of programs, poison, odd shapes."""

import pytest
import torch

from multiexit_engine.ops.best_tokens import BestTokens
from multiexit_engine.ops.edits import TokenEdits
from tests.kernels.hidden_states import two_exits
from tests.kernels.test_best_tokens import assert_told, told
from tests.kernels.test_narrowed_heads import EVERY_WAY, assert_drawn, exact_scores, narrowing
from tests.ops.test_shared_head_tokens import random_edits

heads = pytest.importorskip("multiexit_engine.kernels.heads")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter's memory")

# no integer that is read by mistake leads to memory that exists
NONSENSE = 0x7FFF7FFF
ASKED = torch.tensor([2, -1, 0, 5, 1, 3, 2], dtype=torch.int32)


def changes(rows, vocab):
    """Edits, masks and every way to narrow, on rows of their own and together."""
    ways = [EVERY_WAY[row % len(EVERY_WAY)] for row in range(rows)]
    return {"edits": random_edits(rows, vocab, masked=(1, 4)), "narrowing": narrowing(*ways)}


def chosen(case, kind="both", **given):
    return told(heads.shared_head_tokens, case, kind, asked=ASKED[: len(case.alpha)], **given)


@interpreted
@pytest.mark.parametrize(
    ("kind", "spread"),
    [
        ("both", 0.5),
        *(
            pytest.param(kind, spread, marks=pytest.mark.slow)
            for kind in ("alone", "contrast", "both")
            for spread in (0.5, 4.0)
        ),
    ],
)
def test_bits_do_not_depend_on_the_order_of_programs(kind, spread):
    from tests.kernels.interpreter import program_order

    case = two_exits(3, 300, 32, spread=spread, temperature=0.8)
    results = []
    for seed in (None, 1, 2):
        with program_order(seed):
            results.append(chosen(case, kind, **changes(3, 300)))
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one.nan_to_num(7.0), same.nan_to_num(7.0))


def surrounded(tensor, gap):
    """The same numbers with nonsense before and behind them."""
    if tensor is None or tensor.dim() == 0:
        return tensor
    whole = torch.full((tensor.shape[0] + 2 * gap, *tensor.shape[1:]), _nonsense(tensor.dtype))
    whole = whole.to(tensor.dtype)
    whole[gap : gap + tensor.shape[0]] = tensor
    return whole[gap : gap + tensor.shape[0]]


def _nonsense(dtype):
    return float("nan") if dtype.is_floating_point else NONSENSE


@interpreted
@pytest.mark.parametrize(
    ("kind", "vocab", "width"),
    [
        ("both", 63, 7),
        *(
            pytest.param(kind, vocab, width, marks=pytest.mark.slow)
            for kind in ("alone", "contrast", "both")
            for vocab, width in ((63, 7), (70, 48), (130, 100))
        ),
    ],
)
def test_nothing_is_read_that_nobody_wrote(kind, vocab, width, monkeypatch):
    """Scratch begins as nonsense, and nonsense surrounds every operand."""
    case = two_exits(7, vocab, width, temperature=0.8)
    given = changes(7, vocab)
    wanted = chosen(case, kind, **given)
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(_nonsense(made.dtype))

    monkeypatch.setattr(torch, "empty", poisoned)
    # rows of hidden states are 16 bytes from each other in their own memory as well
    case = type(case)(*(surrounded(part, 16) for part in case.args()))
    given = {
        name: type(part)(*(surrounded(own, 16) for own in part)) for name, part in given.items()
    }
    found = chosen(case, kind, **given)
    for one, same in zip(wanted, found, strict=True):
        assert torch.equal(one.nan_to_num(7.0), same.nan_to_num(7.0))


@pytest.mark.parametrize(
    "shape", [(1, 31, 5), (2, 33, 16), pytest.param((17, 97, 24), marks=pytest.mark.slow)], ids=str
)
def test_odd_shapes(shape, device):
    rows, vocab, width = shape
    case = two_exits(rows, vocab, width, temperature=0.9)
    asked = torch.arange(rows, dtype=torch.int32) % 4 - 1
    given = changes(rows, vocab)
    found = told(heads.shared_head_tokens, case, "both", device, asked, **given)
    scores = exact_scores(case, "both")
    assert_drawn(found[:2], scores, case, given["narrowing"], given["edits"])
    assert_told(found, scores, asked)


def test_edits_in_any_order_and_such_as_do_nothing_change_no_bit(device):
    case = two_exits(7, 300, 24, temperature=0.8)
    edits = random_edits(7, 300, masked=(1, 4))
    order = torch.randperm(len(edits.rows), generator=torch.Generator().manual_seed(1))
    shuffled = [torch.cat([column[order], column[:40]]) for column in edits[:5]]
    shuffled[0][-40:] = 7
    other = TokenEdits(*shuffled, *edits[5:])
    results = [chosen(case, device=device, edits=given) for given in (edits, other)]
    for one, same in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(7.0), same.nan_to_num(7.0))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_a_row_has_the_same_bits_beside_any_others(dtype, device):
    case = two_exits(7, 130, 32, dtype, temperature=0.8)
    given = changes(7, 130)
    together = chosen(case, "contrast", device=device, **given)
    for row in (1, 5):
        own = type(case)(
            *(part if part.shape[0] == 130 else part[row : row + 1] for part in case.args())
        )
        mine = given["edits"].rows == row
        edits = TokenEdits(
            torch.zeros(int(mine.sum()), dtype=torch.int64),
            *(column[mine] for column in given["edits"][1:5]),
            *(column[row : row + 1] for column in given["edits"][5:]),
        )
        alone = told(
            heads.shared_head_tokens, own, "contrast", device, ASKED[row : row + 1], edits=edits,
            narrowing=given["narrowing"].rows(slice(row, row + 1)),
        )  # fmt: skip
        for one, same in zip(alone, together, strict=True):
            assert torch.equal(one[0].nan_to_num(7.0), same[row].nan_to_num(7.0))


def test_what_was_told_to_some_rows_is_put_in_its_place():
    whole = BestTokens(
        torch.ones(3).int(), *(torch.zeros(3, 2).long(), torch.zeros(3, 2)), ASKED[:3]
    )
    index = torch.tensor([2, 0])
    part = BestTokens(*(column[index] + 5 for column in whole))
    whole.put(index, part)
    assert whole.ids.tolist() == [[5, 5], [0, 0], [5, 5]]
