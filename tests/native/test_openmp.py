"""Steps of few rows leave PyTorch's OpenMP threads asleep: they would spin on the team's cores."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from multiexit_engine import Contrast, DoLa, Engine, Exit, SamplingParams, SelfSpeculative
from tests.tiny import save_gpt2

SHARED_OUT = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


class HiddenStatesIndexed(TorchDispatchMode):
    """Notes indexing of matrices as wide as hidden states."""

    def __init__(self, width):
        super().__init__()
        self.width, self.found = width, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in SHARED_OUT and args[0].dim() == 2 and args[0].shape[1] == self.width:
            self.found.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", [Exit(6), Contrast(6, 4), DoLa((0, 2))], ids=str)
def test_drafts_and_checks_index_no_hidden_states(tmp_path, target):
    engine = Engine.from_pretrained(save_gpt2(tmp_path), dtype="float32", backend="native")
    modes = [target, SelfSpeculative(2, 3, target)] * 3
    with HiddenStatesIndexed(engine.model_config.hidden_size) as seen:
        engine.generate([[i, 7, 9] for i in range(6)], SamplingParams(max_new_tokens=12), modes)
    assert not seen.found
