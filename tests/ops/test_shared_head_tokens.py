import math

import pytest
import torch

from multiexit_engine.ops import contrast_tokens, gumbel_noise, head_tokens, shared_head_tokens
from multiexit_engine.ops.contrast import contrast_logits
from multiexit_engine.ops.edits import TokenEdits, edited_scores
from multiexit_engine.ops.tokens import RowGroup
from tests.kernels.hidden_states import assert_chosen, two_exits
from tests.ops.backends import all_backends, device_for, implementation_or_skip

SPANS = slice(0, 2), slice(2, 5), slice(5, 6)
ALPHA = torch.tensor([7.0, 7.0, 0.1, 1e-3, 0.5, 0.01])


def shared_case(temperature):
    """Six rows of one head: two alone, three against one lower head, one against another."""
    case = two_exits(6, 100, 24, temperature=temperature)
    other = torch.randn(100, 24, generator=torch.Generator().manual_seed(3))
    groups = [
        RowGroup(2),
        RowGroup(3, case.lower_hidden[2:5], case.lower_weight),
        RowGroup(1, case.lower_hidden[5:], other),
    ]
    return case, groups


def on(device, *parts):
    return [part.to(device) if isinstance(part, torch.Tensor) else part for part in parts]


def run(function, device, case, groups, *, bias=None, least=None, counts=None, edits=None):
    """Results on the host; a bias that a group names is the shared head's own."""
    shared = None if bias is None else bias.to(device)
    moved = [
        RowGroup(*on(device, *group[:3]), None if group.lower_bias is None else shared)
        for group in groups
    ]
    own = on(device, case.upper_hidden, case.upper_weight)
    rest = on(device, ALPHA, least, case.temperature, case.seeds, case.positions, counts)
    if edits is not None:
        edits = TokenEdits(*on(device, *edits))
    return [part.cpu() for part in function(*own, shared, moved, *rest, edits=edits)]


def one_by_one(case, groups):
    tokens, log_probs = torch.empty(6, dtype=torch.int64), torch.empty(6)
    for rows, group in zip(SPANS, groups, strict=True):
        draws = case.temperature[rows], case.seeds[rows], case.positions[rows]
        own = case.upper_hidden[rows], case.upper_weight
        if group.lower_hidden is None:
            tokens[rows], log_probs[rows] = head_tokens.reference(*own, None, *draws)
        else:
            found = contrast_tokens.reference(*own, *group[1:3], ALPHA[rows], *draws)
            tokens[rows], log_probs[rows] = found
    return tokens, log_probs


def exact(case, groups, bias, least):
    """[rows, vocab] float64 log-probabilities."""
    parts = []
    for rows, group in zip(SPANS, groups, strict=True):
        upper = case.upper_hidden[rows].double() @ case.upper_weight.double().T
        upper = upper if bias is None else upper + bias.double()
        if group.lower_hidden is None:
            parts.append(upper.log_softmax(-1))
            continue
        lower = group.lower_hidden.double() @ group.lower_weight.double().T
        lower = lower if group.lower_bias is None else lower + group.lower_bias.double()
        own = None if least is None else least[rows]
        parts.append(contrast_logits.reference(upper, lower, ALPHA[rows], own))
    return torch.cat(parts)


@all_backends(shared_head_tokens)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_gives_what_the_groups_ops_give(backend, temperature):
    case, groups = shared_case(temperature)
    device = device_for(shared_head_tokens, backend)
    expected, expected_log_probs = one_by_one(case, groups)
    for function in (
        shared_head_tokens.reference,
        implementation_or_skip(shared_head_tokens, backend),
    ):
        tokens, log_probs = run(function, device, case, groups)
        assert tokens.tolist() == expected.tolist()
        torch.testing.assert_close(log_probs, expected_log_probs, atol=2e-5, rtol=0)


@all_backends(shared_head_tokens)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_biases_of_both_heads_count(backend, temperature):
    case, groups = shared_case(temperature)
    bias = torch.linspace(-9, 9, 100)
    groups[1] = groups[1]._replace(lower_bias=bias)
    function = implementation_or_skip(shared_head_tokens, backend)
    found = run(function, device_for(shared_head_tokens, backend), case, groups, bias=bias)
    assert_chosen(found, exact(case, groups, bias, None), case)


@all_backends(shared_head_tokens)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_plausible_sets_are_as_large_as_asked(backend, temperature):
    case, groups = shared_case(temperature)
    least = torch.tensor([1, 1, 1, 7, 0, 60])
    function = implementation_or_skip(shared_head_tokens, backend)
    found = run(function, device_for(shared_head_tokens, backend), case, groups, least=least)
    assert_chosen(found, exact(case, groups, None, least), case)


@all_backends(shared_head_tokens)
@pytest.mark.parametrize("least", [None, torch.tensor([1, 1, 1, 7, 0, 60])], ids=str)
def test_the_plausible_tokens_of_contrasted_rows_are_counted(backend, least):
    case, groups = shared_case(0.0)
    expected = torch.zeros(6, dtype=torch.int32)
    for rows in SPANS[1:]:
        upper = case.upper_hidden[rows] @ case.upper_weight.T
        own = None if least is None else least[rows]
        contrast_logits.reference(upper, upper, ALPHA[rows], own, expected[rows])
    device = device_for(shared_head_tokens, backend)
    for function in (
        shared_head_tokens.reference,
        implementation_or_skip(shared_head_tokens, backend),
    ):
        counts = torch.full((6,), -1, dtype=torch.int32, device=device)
        run(function, device, case, groups, least=least, counts=counts)
        assert counts.tolist() == expected.tolist()


def random_edits(rows=6, vocab=100, *, masked=()):
    """Half of the tokens of all rows but the last two are edited; ``masked`` rows allow a third."""
    generator = torch.Generator().manual_seed(5)

    def uniform(size, low, high):
        return torch.rand(size, generator=generator) * (high - low) + low

    chosen = torch.rand(rows, vocab, generator=generator) < 0.5
    chosen[-2:] = False
    places = chosen.nonzero()
    count = len(places)
    loss = torch.where(uniform(count, 0, 1) < 0.2, math.inf, uniform(count, -1.0, 4.0))
    allowed = torch.rand(rows, vocab, generator=generator) < 1 / 3
    allowed[[row for row in range(rows) if row not in masked]] = True
    edited = chosen.any(1) | ~allowed.all(1)
    return TokenEdits(
        places[:, 0],
        places[:, 1],
        uniform(count, -3, 3),
        uniform(count, 0.5, 2.0),
        loss,
        words_of(allowed) if masked else None,
        edited.int(),
    )


def words_of(allowed):
    """[rows, words] int32 of [rows, vocab] bool."""
    vocab = allowed.shape[1]
    padded = torch.nn.functional.pad(allowed, (0, -vocab % 32)).unflatten(1, (-1, 32))
    return (padded.long() << torch.arange(32)).sum(-1).to(torch.int32)


def assert_best_after_edits(found, scores, edits, case):
    """Tokens are the best of edited scores; log-probabilities those before any edit."""
    edited = edited_scores(
        scores,
        TokenEdits(
            *(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in edits)
        ),
    )
    tokens, _ = found
    sampled = (case.temperature > 0)[:, None]
    noise = ops_noise(case, scores.shape[1])
    keys = edited / torch.where(sampled, case.temperature[:, None], 1.0)
    keys = keys + torch.where(sampled, noise, 0.0)
    behind = keys.amax(-1) - keys.gather(1, tokens[:, None])[:, 0]
    assert behind.max() <= 1e-4
    logprobs = scores.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found[1].double(), logprobs, atol=2e-5, rtol=0)


def ops_noise(case, vocab):
    return gumbel_noise.reference(case.seeds, case.positions, vocab).double()


EDITING = pytest.mark.parametrize("backend", ["reference", "triton"])


@EDITING
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("masked", [(), (0, 2, 5)], ids=["all allowed", "masks"])
@pytest.mark.parametrize("least", [None, torch.tensor([1, 1, 1, 7, 0, 60])], ids=["one", "many"])
def test_edits_come_between_scores_and_choice(backend, temperature, masked, least):
    case, groups = shared_case(temperature)
    edits = random_edits(masked=masked)
    function = implementation_or_skip(shared_head_tokens, backend)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = run(function, device, case, groups, least=least, edits=edits)
    scores = exact(case, groups, None, least)
    logits = case.upper_hidden[:2].double() @ case.upper_weight.double().T
    assert_best_after_edits(found, torch.cat([logits, scores[2:]]), edits, case)


@EDITING
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_of_one_head_may_have_edits_and_no_contrast(backend, temperature):
    case, _ = shared_case(temperature)
    edits = random_edits(masked=(1, 3))
    function = implementation_or_skip(shared_head_tokens, backend)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = run(function, device, case, [RowGroup(6)], edits=edits)
    logits = case.upper_hidden.double() @ case.upper_weight.double().T
    assert_best_after_edits(found, logits, edits, case)


@EDITING
def test_a_row_that_nothing_is_left_of_says_so(backend):
    case, groups = shared_case(0.0)
    allowed = torch.ones(6, 100, dtype=torch.bool)
    allowed[[0, 3]] = False
    none, edited = torch.empty(0), (~allowed.all(1)).int()
    edits = TokenEdits(none.long(), none.long(), none, none, none, words_of(allowed), edited)
    function = implementation_or_skip(shared_head_tokens, backend)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, log_probs = run(function, device, case, groups, edits=edits)
    assert (log_probs == -math.inf).tolist() == [True, False, False, True, False, False]
    assert ((tokens >= 0) & (tokens < 100)).all()


def test_rows_without_edits_have_the_same_bits_beside_rows_with():
    case, groups = shared_case(0.0)
    function = implementation_or_skip(shared_head_tokens, "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    alone = run(function, device, case, groups)
    beside = run(function, device, case, groups, edits=random_edits())
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one[-2:], other[-2:])
