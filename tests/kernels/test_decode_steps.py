"""Decode steps in memory that stays where it is, on the GPU's kernels: padding, bounds, groups."""

from contextlib import nullcontext

import pytest
import torch

from multiexit_engine import Contrast, Engine, Exit, Original, SamplingParams
from multiexit_engine.ops import assume_device
from tests.kernels.launched import in_pieces
from tests.tiny import save_gpt2

pytest.importorskip("multiexit_engine.kernels.heads")

PROMPTS = [[1, 2, 3], [200, 100, 50, 25, 12], [9] * 20]
MODES = [Original(), Exit(2), Contrast(4, 2, min_candidates=2)]
DRAWN = SamplingParams(max_new_tokens=3, ignore_eos=True, temperature=1.0, top_k=0, seed=3)
NARROWED = SamplingParams(max_new_tokens=3, ignore_eos=True, temperature=1.0, top_p=0.9, seed=3)
EDITED = SamplingParams(
    max_new_tokens=3, ignore_eos=True, repetition_penalty=1.5, presence_penalty=1.0, logprobs=2
)
KINDS = pytest.mark.parametrize(
    "sampling", [DRAWN, NARROWED, EDITED], ids=["drawn", "narrowed", "edited and listed"]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("gpt2"), num_layers=4, num_heads=2, exits=(2, 4))


def ids(engine, sampling=DRAWN):
    """And which tokens are listed beside them."""
    outputs = [o.outputs[0] for o in engine.generate(PROMPTS, sampling, MODES)]
    return [(one.token_ids, [list(listed) for listed in one.logprobs or []]) for one in outputs]


@KINDS
def test_padded_pieces_give_the_ids_of_the_reference(folder, sampling, device):
    """Pieces are called again instead of captured, with what their first call was given."""
    kept = {"device": device, "dtype": "float32", "max_model_len": 64}
    engine = Engine.from_pretrained(folder, backend="native", **kept)
    pieces = in_pieces(engine, (2, 4))
    with nullcontext() if device == "cuda" else assume_device("cuda"):
        found = ids(engine, sampling)
    assert pieces.num_captured
    assert found == ids(Engine.from_pretrained(folder, backend="reference", **kept), sampling)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ahead", [False, True], ids=["one at a time", "ahead"])
@pytest.mark.parametrize("backend", ["reference", "native"])
@KINDS
def test_cuda_graphs_give_the_ids_of_the_reference(folder, sampling, backend, ahead):
    kept = {"device": "cuda", "dtype": "float32", "max_model_len": 64}
    options = {"backend": backend, "cuda_graphs": True, "async_scheduling": ahead}
    found = ids(Engine.from_pretrained(folder, **kept, **options), sampling)
    assert found == ids(Engine.from_pretrained(folder, backend="reference", **kept), sampling)
