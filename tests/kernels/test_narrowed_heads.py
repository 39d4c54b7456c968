"""top_k, top_p and min_p inside the heads: the tokens of the definition in float64."""

import pytest
import torch

from multiexit_engine.ops.contrast import contrast_logits
from multiexit_engine.ops.edits import TokenEdits, edited_scores
from multiexit_engine.ops.narrowing import Narrowing, narrowed_scores
from multiexit_engine.ops.sampling import gumbel_noise
from multiexit_engine.ops.tokens import RowGroup
from tests.kernels.hidden_states import two_exits
from tests.ops.test_shared_head_tokens import random_edits

heads = pytest.importorskip("multiexit_engine.kernels.heads")

# top_k, top_p, min_p
EVERY_WAY = [
    (50, 1.0, 0.0),
    (1, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.2, 0.0),
    (0, 1.0, 0.05),
    (7, 0.8, 0.1),
    (0, 1.0, 0.0),
]


def narrowing(*rows):
    top_k, top_p, min_p = zip(*rows, strict=True)
    unlikely = [1 - p if p < 1 else -1.0 for p in top_p]
    return Narrowing(
        torch.tensor(top_k, dtype=torch.int32), torch.tensor(unlikely), torch.tensor(min_p)
    )


def lowers_of(case, kind):
    """Groups of the case's rows: all alone, all contrasted, or the first half contrasted."""
    rows = len(case.alpha)
    if kind == "alone":
        return [RowGroup(rows)]
    if kind == "contrast":
        return [RowGroup(rows, case.lower_hidden, case.lower_weight)]
    half = rows // 2
    return [
        RowGroup(half, case.lower_hidden[:half], case.lower_weight),
        RowGroup(rows - half),
    ]


def chosen(case, kind, narrow, device="cpu", edits=None, least=None):
    moved = case.to(device)
    groups = lowers_of(moved, kind)
    given = None if edits is None else TokenEdits(*on(device, edits))
    found = heads.shared_head_tokens(
        moved.upper_hidden, moved.upper_weight, None, groups, moved.alpha, least,
        moved.temperature, moved.seeds, moved.positions,
        edits=given, narrowing=Narrowing(*on(device, narrow)),
    )  # fmt: skip
    return [part.cpu() for part in found]


def on(device, parts):
    return [part.to(device) if isinstance(part, torch.Tensor) else part for part in parts]


def exact_scores(case, kind, least=None):
    """[rows, vocab] float64: logits, log-probabilities of contrasts."""
    upper = case.upper_hidden.double() @ case.upper_weight.double().T
    lower = case.lower_hidden.double() @ case.lower_weight.double().T
    contrast = contrast_logits.reference(upper, lower, case.alpha, least)
    count = {"alone": 0, "contrast": len(upper), "both": len(upper) // 2}[kind]
    return torch.cat([contrast[:count], upper[count:]])


def assert_drawn(found, scores, case, narrow, edits=None):
    """Tokens are those of the definition, log-probabilities those before any change."""
    tokens, logprobs = found
    changed = scores
    if edits is not None:
        wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in edits]
        changed = edited_scores(scores, TokenEdits(*wide))
    kept = narrowed_scores(changed / case.temperature[:, None], narrow)
    noise = gumbel_noise.reference(case.seeds, case.positions, scores.shape[1]).double()
    assert tokens.tolist() == (kept + noise).argmax(-1).tolist()
    expected = scores.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "vocab", "temperature"),
    [
        ("contrast", 63, 1.5),
        ("alone", 500, 0.7),
        *(
            pytest.param(kind, vocab, temperature, marks=pytest.mark.slow)
            for kind in ("alone", "contrast", "both")
            for vocab in (63, 3000)
            for temperature in (0.7, 1.5)
        ),
    ],
)
def test_draws_are_those_of_the_definition(kind, vocab, temperature, device):
    case = two_exits(7, vocab, 24, temperature=temperature)
    narrow = narrowing(*EVERY_WAY)
    found = chosen(case, kind, narrow, device)
    assert_drawn(found, exact_scores(case, kind), case, narrow)


EVEN = narrowing(*[(5, 0.9, 0.0)] * 3)


@pytest.mark.parametrize("kind", [pytest.param("alone", marks=pytest.mark.slow), "both"])
def test_edits_come_first(kind, device):
    case = two_exits(6, 300, 24, temperature=0.8)
    edits = random_edits(6, 300, masked=(1, 4))
    narrow = narrowing(*EVERY_WAY[:6])
    found = chosen(case, kind, narrow, device, edits=edits)
    assert_drawn(found, exact_scores(case, kind), case, narrow, edits)


def test_plausible_sets_of_more_than_one_token_at_least(device):
    case = two_exits(3, 300, 24, temperature=0.8)
    least = torch.tensor([7, 0, 1])
    found = chosen(case, "contrast", EVEN, device, least=least.to(device))
    assert_drawn(found, exact_scores(case, "contrast", least), case, EVEN)


@pytest.mark.slow
def test_flat_distributions(device):
    case = two_exits(7, 500, 16, spread=0.1, temperature=1.0)
    narrow = narrowing(*EVERY_WAY)
    assert_drawn(
        chosen(case, "contrast", narrow, device), exact_scores(case, "contrast"), case, narrow
    )


@pytest.mark.parametrize("way", [(3, 1.0, 0.0), (0, 1.0, 1.0), (30, 0.3, 0.0)])
def test_equal_tokens_stay_or_go_as_defined(way, device):
    """Logits of four values: hundreds of tokens tie with the last that is kept."""
    case = two_exits(4, 200, 4, temperature=1.0)
    case.upper_hidden[:] = torch.tensor([1.0, 0, 0, 0])
    case.upper_weight[:, 0] = torch.arange(200) % 4 * 0.25
    narrow = narrowing(*[way] * 4)
    assert_drawn(chosen(case, "alone", narrow, device), exact_scores(case, "alone"), case, narrow)


def test_greedy_rows_take_the_best_whatever_they_ask_for(device):
    case = two_exits(3, 300, 24, temperature=0.0)
    tokens, _ = chosen(case, "contrast", EVEN, device)
    assert tokens.tolist() == exact_scores(case, "contrast").argmax(-1).tolist()


def test_a_row_has_the_same_bits_beside_any_others(device):
    case = two_exits(7, 300, 24, temperature=0.8)
    narrow = narrowing(*EVERY_WAY)
    together = chosen(case, "contrast", narrow, device)
    for row in (2, 5):
        own = type(case)(*(
            part if part.shape[0] == 300 else part[row : row + 1] for part in case.args()
        ))  # fmt: skip
        alone = chosen(own, "contrast", narrow.rows(slice(row, row + 1)), device)
        assert [part.item() for part in alone] == [part[row].item() for part in together]


def test_a_row_that_is_not_narrowed_has_the_bits_of_one_without_company(device):
    case = two_exits(2, 300, 24, temperature=0.8)
    groups = lowers_of(case, "contrast")
    beside = chosen(case, "contrast", narrowing((0, 1.0, 0.0), (5, 1.0, 0.0)), device)
    alone = heads.shared_head_tokens(
        case.upper_hidden, case.upper_weight, None, groups, case.alpha, None,
        case.temperature, case.seeds, case.positions,
    )  # fmt: skip
    assert [part[0].item() for part in alone] == [part[0].item() for part in beside]


def test_a_row_of_nan_harms_no_other(device):
    case = two_exits(3, 300, 24, temperature=0.8)
    case.upper_hidden[1] = float("nan")
    tokens, logprobs = chosen(case, "contrast", EVEN, device)
    assert ((tokens >= 0) & (tokens < 300)).all()
    assert logprobs.isnan().tolist() == [False, True, False]


def test_a_row_that_edits_leave_nothing_of_says_so(device):
    case = two_exits(2, 100, 24, temperature=0.8)
    none = torch.empty(0)
    words = torch.tensor([[0] * 4, [-1] * 4], dtype=torch.int32)
    edits = TokenEdits(
        none.long(), none.long(), none, none, none, words, torch.tensor([1, 0]).int()
    )
    tokens, logprobs = chosen(case, "alone", narrowing((5, 0.9, 0.1), (5, 0.9, 0.1)), edits=edits)
    assert (logprobs == -torch.inf).tolist() == [True, False]
    assert 0 <= tokens[0] < 100
