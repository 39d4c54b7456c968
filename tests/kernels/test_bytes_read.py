"""What the contrast reads of memory, counted in the interpreter."""

import math

import pytest
import torch

from multiexit_engine.decoding.gates import joint_statistics
from multiexit_engine.layers.exit_heads import HeadOperands
from multiexit_engine.ops import assume_device
from multiexit_engine.ops.narrowing import Narrowing
from multiexit_engine.ops.tokens import RowGroup
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


def test_exits_of_one_matrix_are_measured_in_one_pass(bytes_read):
    case = two_exits(5, 300, 64, torch.bfloat16)
    exits = [
        HeadOperands(states, case.upper_weight, None)
        for states in (case.upper_hidden, case.lower_hidden, case.upper_hidden[:2])
    ]
    with assume_device("cuda"):
        found = joint_statistics(exits)
    assert bytes_read(case.upper_weight) == case.upper_weight.nbytes
    for own, exit_ in zip(found, exits, strict=True):
        logits = exit_.hidden.double() @ exit_.weight.double().T
        assert own.tokens.tolist() == logits.argmax(-1).tolist()


def test_of_a_narrowed_row_a_few_tiles_are_read_back(bytes_read, monkeypatch):
    """Its logits are written to scratch: what top_k=5 reads of them is a part."""
    case = two_exits(1, 8000, 64, torch.bfloat16, temperature=1.0)
    made = []
    empty = torch.empty

    def noted(*shape, **options):
        made.append(empty(*shape, **options))
        return made[-1]

    monkeypatch.setattr(torch, "empty", noted)
    narrow = Narrowing(torch.tensor([5]).int(), torch.tensor([-1.0]), torch.zeros(1))
    heads.shared_head_tokens(
        case.upper_hidden, case.upper_weight, None, [RowGroup(1)], case.alpha, None,
        case.temperature, case.seeds, case.positions, narrowing=narrow,
    )  # fmt: skip
    assert bytes_read(case.upper_weight) == case.upper_weight.nbytes
    (scratch,) = [part for part in made if part.shape == (2, 1, 8000)]
    once = 16 * 32 * 4  # 16 tiles
    assert 0 < bytes_read(scratch[0]) <= 2 * once  # when keys are made, and for the draw
    assert bytes_read(scratch[1]) <= 40 * once
