"""Steps of few rows leave PyTorch's OpenMP threads asleep: they would spin on the team's cores."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from multiexit_engine import (
    Contrast,
    DoLa,
    Engine,
    Exit,
    Parallel,
    SamplingParams,
    SelfSpeculative,
)
from multiexit_engine.decoding.certainty import certain_rows
from multiexit_engine.ops import code_head, code_states, logit_bounds
from tests.ops.test_rough_head_sums import coded
from tests.tiny import save_gpt2

ELMER = Path(__file__).parents[1] / "golden" / "elmer" / "t1"

SHARED_OUT = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}
# these are from 64 rows of 768 numbers on
SHARED_OUT_OF_MANY = SHARED_OUT | {
    torch.ops.aten.embedding.default,
    torch.ops.aten.index_select.default,
    torch.ops.aten.index_copy_.default,
    torch.ops.aten.clone.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.add.Tensor,
    torch.ops.aten.mul.Tensor,
}


class Touched(TorchDispatchMode):
    """Notes all ops that read one tensor."""

    def __init__(self, tensor):
        super().__init__()
        self.tensor, self.found = tensor, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and args[0] is self.tensor:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchDispatchMode):
    """Notes all ops."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.add(func)
        return func(*args, **(kwargs or {}))


class HiddenStatesTouched(TorchDispatchMode):
    """Notes which of some ops read matrices as wide as hidden states."""

    def __init__(self, width, ops):
        super().__init__()
        self.width, self.ops, self.found = width, ops, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.ops and args[0].dim() == 2 and args[0].shape[1] == self.width:
            self.found.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", [Exit(6), Contrast(6, 4), DoLa((0, 2))], ids=str)
def test_drafts_and_checks_index_no_hidden_states(tmp_path, target):
    engine = Engine.from_pretrained(save_gpt2(tmp_path), dtype="float32", backend="native")
    modes = [target, SelfSpeculative(2, 3, target)] * 3
    with HiddenStatesTouched(engine.model_config.hidden_size, SHARED_OUT) as seen:
        engine.generate([[i, 7, 9] for i in range(6)], SamplingParams(max_new_tokens=12), modes)
    assert not seen.found


@pytest.mark.parametrize(
    "mode",
    [
        Parallel(length=9),
        Parallel("confidence", "max_prob", 0.4, length=9),
        Parallel("prescribed", layers=[1, 3, 2]),
        Parallel("soft", length=9),
    ],
    ids=str,
)
def test_passes_over_packed_texts_leave_hidden_states_to_the_kernels(mode):
    engine = Engine.from_pretrained(ELMER, dtype="float32", backend="native")
    sources, sampling = [[5, 7, 9], [8] * 11], SamplingParams(ignore_eos=True)
    engine.generate(sources, sampling, mode)  # what depends on the length alone is made
    with HiddenStatesTouched(engine.model_config.hidden_size, SHARED_OUT_OF_MANY) as seen:
        engine.generate(sources, sampling, mode)
    assert not seen.found


def test_bounds_of_codes_read_a_bias_once():
    head, bias = code_head(torch.randn(40, 8)), torch.randn(40)
    states = code_states(torch.randn(2, 8), head)
    first = logit_bounds(states, head, bias)
    with Touched(bias) as seen:
        again = logit_bounds(states, head, bias)
    assert not seen.found and torch.equal(first.slacks, again.slacks)


def test_verdicts_on_rough_logits_call_no_op_that_wakes_threads():
    hidden, weight = torch.randn(300, 8), torch.randn(40, 8)
    kinds = ["max_prob", "margin", "entropy", "surprise"] * 75
    found = coded(hidden, weight, None)
    with Called() as seen:
        certain_rows(*found, kinds, [0.5] * 300)
    assert not seen.found & {torch.ops.aten.exp.default, torch.ops.aten.log.default}
