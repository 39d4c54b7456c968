"""Best tokens and ranks told by the heads: those of float64, whatever else is done to the rows."""

import pytest
import torch

from multiexit_engine.ops import shared_head_tokens
from multiexit_engine.ops.best_tokens import BestTokens
from tests.kernels.hidden_states import two_exits
from tests.kernels.test_narrowed_heads import exact_scores, lowers_of, narrowing, on
from tests.ops.test_shared_head_tokens import random_edits

heads = pytest.importorskip("multiexit_engine.kernels.heads")

MOST = 9
ASKED = torch.tensor([5, -1, 0, MOST, 1, 3, 2], dtype=torch.int32)
KINDS = pytest.mark.parametrize("kind", ["alone", "contrast", "both"])


def unwritten(asked, device):
    """Memory whose contents nobody may take for a result."""
    rows = len(asked)
    return BestTokens(
        asked.to(device),
        torch.full((rows, MOST), -77, device=device),
        torch.full((rows, MOST), float("nan"), device=device),
        torch.full((rows,), -77, device=device),
    )


def told(function, case, kind, device="cpu", asked=ASKED, least=None, **changes):
    """Tokens, their log-probabilities, and what was told beside them."""
    moved = case.to(device)
    best = unwritten(asked, device)
    moved_changes = {name: type(part)(*on(device, part)) for name, part in changes.items()}
    found = function(
        moved.upper_hidden, moved.upper_weight, None, lowers_of(moved, kind), moved.alpha,
        None if least is None else least.to(device), moved.temperature, moved.seeds,
        moved.positions, best=best, **moved_changes,
    )  # fmt: skip
    return [part.cpu() for part in (*found, *best[1:])]


def assert_told(found, scores, asked=ASKED, tolerance=2e-5):
    """Log-probabilities in their order, of tokens that have them; ranks, ties apart."""
    tokens, logprobs, ids, values, ranks = found
    exact = scores.log_softmax(-1)
    best = exact.sort(-1, descending=True).values
    for row, count in enumerate(asked.tolist()):
        own = exact[row, tokens[row]]
        assert abs(logprobs[row] - own) <= tolerance
        if count < 0:
            assert ranks[row] == -77
            continue
        listed = ids[row, :count]
        assert len(set(listed.tolist())) == count
        torch.testing.assert_close(
            values[row, :count].double(), best[row, :count], atol=2e-5, rtol=0
        )
        torch.testing.assert_close(exact[row, listed], best[row, :count], atol=2e-5, rtol=0)
        assert values[row, count:].isnan().all()
        low, high = (1 + int((exact[row] > own + gap).sum()) for gap in (tolerance, -tolerance))
        assert low <= ranks[row] <= high


@KINDS
@pytest.mark.parametrize(("vocab", "temperature"), [(63, 1.5), (1031, 0.0), (1031, 0.8)])
def test_best_tokens_are_those_of_the_definition(kind, vocab, temperature, device):
    case = two_exits(7, vocab, 24, temperature=temperature)
    found = told(heads.shared_head_tokens, case, kind, device)
    assert_told(found, exact_scores(case, kind))


def test_the_reference_tells_the_same(device):
    case = two_exits(7, 300, 24, temperature=0.8)
    tokens, logprobs, ids, values, ranks = told(shared_head_tokens.reference, case, "both", device)
    values, ids = (part.masked_fill(torch.arange(MOST) >= ASKED[:, None], gap)
                   for part, gap in ((values, float("nan")), (ids, -77)))  # fmt: skip
    ranks = torch.where(ASKED < 0, -77, ranks)
    assert_told((tokens, logprobs, ids, values, ranks), exact_scores(case, "both"))


@KINDS
def test_edits_and_narrowing_do_not_count(kind, device):
    case = two_exits(7, 300, 24, temperature=0.8)
    changes = {
        "edits": random_edits(7, 300, masked=(1, 4)),
        "narrowing": narrowing(
            (50, 1.0, 0.0), (0, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05), (7, 0.8, 0.1),
            (0, 1.0, 0.0), (1, 1.0, 0.0),
        ),
    }  # fmt: skip
    scores = exact_scores(case, kind)
    for names in (["edits"], ["narrowing"], ["edits", "narrowing"]):
        own = {name: changes[name] for name in names}
        found = told(heads.shared_head_tokens, case, kind, device, **own)
        plain = heads.shared_head_tokens(
            case.upper_hidden, case.upper_weight, None, lowers_of(case, kind), case.alpha, None,
            case.temperature, case.seeds, case.positions, **own,
        ) if device == "cpu" else found  # fmt: skip
        assert found[0].tolist() == plain[0].tolist()
        assert_told(found, scores)


def test_plausible_sets_of_more_than_one_token_at_least(device):
    case = two_exits(7, 300, 24, temperature=0.8)
    least = torch.tensor([1, 7, 0, 1, 60, 2, 1])
    found = told(heads.shared_head_tokens, case, "contrast", device, least=least)
    assert_told(found, exact_scores(case, "contrast", least))


def test_flat_distributions_in_which_every_token_is_plausible(device):
    case = two_exits(7, 500, 16, spread=0.1, temperature=1.0)
    found = told(heads.shared_head_tokens, case, "contrast", device)
    assert_told(found, exact_scores(case, "contrast"))


def test_of_equal_tokens_the_lowest_are_listed_first(device):
    case = two_exits(1, 200, 4)
    case.upper_hidden[:] = torch.tensor([1.0, 0, 0, 0])
    case.upper_weight[:, 0] = torch.arange(200) % 4 * 0.25
    asked = torch.tensor([5], dtype=torch.int32)
    _, _, ids, _, ranks = told(heads.shared_head_tokens, case, "alone", device, asked)
    assert ids[0, :5].tolist() == [3, 7, 11, 15, 19]
    assert ranks.tolist() == [1]


def test_more_rows_than_one_launch_takes(device):
    case = two_exits(66, 70, 16)
    asked = torch.full((66,), 2, dtype=torch.int32)
    found = told(heads.shared_head_tokens, case, "both", device, asked)
    assert_told(found, exact_scores(case, "both"), asked)


def test_a_row_has_the_same_bits_whether_it_tells_or_not(device):
    case = two_exits(7, 300, 24, temperature=0.8)
    beside = told(heads.shared_head_tokens, case, "both", device)
    moved = case.to(device)
    alone = heads.shared_head_tokens(
        moved.upper_hidden, moved.upper_weight, None, lowers_of(moved, "both"), moved.alpha, None,
        moved.temperature, moved.seeds, moved.positions,
    )  # fmt: skip
    for one, other in zip(alone, beside, strict=False):
        assert torch.equal(one.cpu(), other)


def test_a_row_of_nan_tells_legal_tokens_and_harms_no_other(device):
    case = two_exits(7, 300, 24, temperature=0.8)
    case.upper_hidden[0] = float("nan")
    found = told(heads.shared_head_tokens, case, "contrast", device)
    assert ((found[2][0, :5] >= 0) & (found[2][0, :5] < 300)).all()
    scores, rest = exact_scores(case, "contrast"), slice(1, 7)
    assert_told([part[rest] for part in found], scores[rest], ASKED[rest])
