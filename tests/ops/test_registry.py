"""Which backend an op runs: the first that fits and loads."""

import pytest
import torch

from multiexit_engine.errors import BackendUnavailable
from multiexit_engine.ops import NATIVE, Op, use_backend


@pytest.fixture
def op(monkeypatch):
    """An op that gives "reference", with backends that do not load and one that is torch.neg."""
    monkeypatch.setattr(Op, "registry", {})
    return Op(lambda x: "reference")


def test_a_backend_that_does_not_load_leaves_the_call_to_the_next(op):
    op.backend("missing", "no_such_module:function", device="cpu")
    op.backend("present", "torch:neg", device="cpu")
    op.require("cpu")
    with use_backend(NATIVE):
        assert op(torch.ones(1)) == -1


def test_native_demands_that_one_of_the_fitting_backends_loads(op):
    op.backend("missing", "no_such_module:function", device="cpu")
    op.backend("other", "torch:neg", device="cpu", supports=lambda x: False)
    assert op(torch.ones(1)) == "reference"
    with use_backend(NATIVE), pytest.raises(BackendUnavailable, match="backend 'missing'"):
        op(torch.ones(1))


def test_a_device_is_served_if_one_of_its_backends_loads(op):
    op.backend("missing", "no_such_module:function", device="cpu")
    op.require("cuda")
    with pytest.raises(BackendUnavailable, match="no_such_module"):
        op.require("cpu")
