"""Edits of a step's rows are laid out by one launch, and by nothing of PyTorch's."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from multiexit_engine.ops import assume_device
from multiexit_engine.runtime.launched.edit_memory import EditMemory, EditRoom

kernels = pytest.importorskip("multiexit_engine.kernels.head_edits")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="launches are counted, not made")
# what gives a tensor and computes nothing
FREE = ("empty", "view", "slice", "select", "unbind", "alias", "detach", "as_strided")


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("are_masked", [False, True], ids=["all allowed", "masked"])
@pytest.mark.parametrize("rows", [slice(0, 3), torch.tensor([4, 1])], ids=["first", "listed"])
def test_edits_of_rows_are_one_launch(rows, are_masked, monkeypatch):
    launches = []

    class Launched:
        def __getitem__(self, grid):
            return lambda *_, **__: launches.append(grid)

    monkeypatch.setattr(kernels, "edits_kernel", Launched())
    memory = EditMemory(5, 100, torch.device("cpu"))
    with assume_device("cuda"), torch.inference_mode(), Operations() as operations:
        edits = memory.edits(rows, EditRoom(256, are_masked))
        assert kernels.pack_edits(edits, 100).is_edited is edits.is_edited
    assert [name for name in operations.names if not name.startswith(FREE)] == []
    assert launches == [(len(edits.is_edited),)]
    # or Triton would compile what reads them for some numbers of rows, and again for the others
    assert all(part.data_ptr() % 16 == 0 for part in edits)
