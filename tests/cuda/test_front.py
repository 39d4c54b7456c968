"""What the front and the C interface refuse, and which calls the registry hands to them."""

import pytest
import torch

from multiexit_engine import ops
from multiexit_engine._cuda.library import HeadCall, Library
from multiexit_engine.ops import operands
from tests.kernels.hidden_states import two_exits


def case(rows=1, vocab=16, width=16, dtype=torch.bfloat16):
    return two_exits(rows, vocab, width, dtype)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"rows": 5}, "16 x 16 for 5 rows.*rows must be 1 to 4"),
        ({"width": 12}, "the width a multiple of 8"),
        ({"dtype": torch.float32}, "both must be bfloat16, or both float16"),
        ({"rows": 4, "width": 40_000}, "do not fit the shared memory"),
    ],
)
def test_a_shape_that_the_kernels_do_not_run_is_refused(ring, shape, message):
    with pytest.raises(ValueError, match=message):
        ring.heads.head_tokens(*case(**shape).head_args())


def test_heads_of_two_shapes_are_refused(ring):
    args, other = list(case().args()), case(vocab=17)
    args[3] = other.lower_weight
    with pytest.raises(ValueError, match="lower head .*17, 16.*must be of the upper one's shape"):
        ring.heads.contrast_tokens(*args)


def test_weights_that_do_not_lie_row_after_row_are_refused(ring):
    args = list(case().head_args())
    args[1] = torch.zeros(16, 32, dtype=torch.bfloat16)[:, ::2]
    with pytest.raises(ValueError, match="must be contiguous"):
        ring.heads.head_tokens(*args)


def test_a_misaligned_matrix_is_refused(ring):
    args = list(case().head_args())
    args[1] = torch.zeros(16 * 16 + 1, dtype=torch.bfloat16)[1:].view(16, 16)
    with pytest.raises(ValueError, match="not a multiple of 16"):
        ring.heads.head_tokens(*args)


def test_a_call_without_addresses_is_refused(ring):
    call = HeadCall(rows=1, vocab=16, width=16, number_type=1)
    with pytest.raises(ValueError, match="an address is missing"):
        ring.library.run(call, ring.library.plan(call), 0)


def test_a_library_that_was_not_built_names_the_remedy(tmp_path):
    with pytest.raises(ImportError, match="MULTIEXIT_CUDA=1"):
        Library(tmp_path / "libmultiexit_cuda.so")


def test_a_file_that_is_no_library_is_an_import_error(tmp_path):
    (tmp_path / "lib.so").write_text("no machine code")
    with pytest.raises(ImportError, match="do not load"):
        Library(tmp_path / "lib.so")


def test_a_library_of_other_sources_is_an_import_error(ring, monkeypatch):
    monkeypatch.setattr("multiexit_engine._cuda.library.INTERFACE", 999)
    with pytest.raises(ImportError, match="interface 4, these sources have 999: build it anew"):
        Library(ring.library.path)


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ({}, True),
        ({"rows": 4, "width": 4096}, True),
        ({"rows": 1, "width": 16384}, True),
        ({"rows": 0}, False),
        ({"rows": 5}, False),
        ({"rows": 3, "width": 4104}, False),
        ({"width": 12}, False),
        ({"dtype": torch.float32}, False),
    ],
    ids=str,
)
def test_the_registry_hands_over_what_the_kernels_run(monkeypatch, shape, fits):
    monkeypatch.setattr(operands, "_capability", lambda _: (9, 0))
    supports = ops.contrast_tokens.backends["cuda"].supports
    assert supports(*case(**shape).args()) is fits


@pytest.mark.parametrize(("capability", "fits"), [((0, 0), False), ((7, 5), False), ((8, 0), True)])
def test_the_registry_asks_for_the_capability(monkeypatch, capability, fits):
    monkeypatch.setattr(operands, "_capability", lambda _: capability)
    assert ops.head_tokens.backends["cuda"].supports(*case().head_args()) is fits


def test_the_library_comes_before_triton():
    for op in (ops.head_tokens, ops.contrast_tokens):
        on_gpu = [name for name, each in op.backends.items() if each.device == "cuda"]
        assert on_gpu == ["cuda", "triton"]
