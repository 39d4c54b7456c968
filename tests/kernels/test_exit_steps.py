"""Exits decided on the device by the GPU's kernels: the reference's choices, no weight in vain."""

from contextlib import nullcontext

import pytest
import torch

from multiexit_engine import EarlyExit, Engine, Original, SamplingParams, SelfSpeculative
from multiexit_engine.ops import assume_device
from tests.forms import written_in
from tests.kernels.launched import in_pieces
from tests.tiny import save_gpt2

pytest.importorskip("multiexit_engine.kernels.exit_rows")

PROMPTS = [[1, 2, 3], [200, 100, 50, 25, 12], [77]]
MODES = [EarlyExit(0.3), EarlyExit(0.85, "similarity", kv="copy"), Original()]
GREEDY = SamplingParams(max_new_tokens=5, ignore_eos=True)
DRAWN = SamplingParams(max_new_tokens=5, ignore_eos=True, temperature=1.0, top_k=0, seed=3)
WISHES = [
    SamplingParams(max_new_tokens=5, ignore_eos=True, repetition_penalty=1.5, logprobs=3),
    SamplingParams(
        max_new_tokens=5, ignore_eos=True, temperature=1.0, top_k=9, seed=3, presence_penalty=2.0
    ),
    SamplingParams(max_new_tokens=5, **written_in("[a-z]{6}")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("gpt2"), num_layers=4, num_heads=2, exits=(1, 2, 4))


def opened(folder, device, backend, quantization=None):
    options = {"dtype": "float32", "max_model_len": 64, "max_batch_size": 4}
    options["quantization"] = quantization
    return Engine.from_pretrained(folder, device=device, backend=backend, **options)


def launching(folder, device, quantization=None):
    """An engine whose steps are launched as on a GPU; pieces are called again, not captured."""
    engine = opened(folder, device, "native", quantization)
    in_pieces(engine, (2, 4))
    return engine


def rehearsal(device):
    return nullcontext() if device == "cuda" else assume_device("cuda")


def told(engine, sampling, modes=MODES, prompts=PROMPTS):
    found = [output.outputs[0] for output in engine.generate(prompts, sampling, modes)]
    ranked = [[(*rank(each),) for each in one.logprobs or []] for one in found]
    ids = [(one.token_ids, one.exit_layers) for one in found]
    return [*zip(ids, ranked, strict=True)], [one.confidences for one in found]


def rank(logprobs):
    return ((token, found.rank) for token, found in logprobs.items())


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, WISHES], ids=["greedy", "drawn", "wishes"])
def test_launched_steps_give_the_choices_of_the_reference(folder, sampling, device):
    engine = launching(folder, device)
    with rehearsal(device):
        found = told(engine, sampling)
    wanted = told(opened(folder, device, "reference"), sampling)
    assert found[0] == wanted[0]
    for one, other in zip(found[1], wanted[1], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert {layer for (_, layers), _ in wanted[0] for layer in layers} >= {1, 2, 4}


@pytest.mark.parametrize("mode", MODES[:2], ids=str)
def test_prompts_are_scored_by_the_exits_of_the_reference(folder, mode, device):
    engine = launching(folder, device)
    with rehearsal(device):
        (found,) = engine.score(PROMPTS[1:2], decoding=mode)
    (wanted,) = opened(folder, device, "reference").score(PROMPTS[1:2], decoding=mode)
    assert found.token_logprobs[1:] == pytest.approx(wanted.token_logprobs[1:], abs=1e-4)


def test_drafts_beside_early_exits_give_the_choices_of_the_reference(folder, device):
    modes = [SelfSpeculative(2, 2), EarlyExit(0.3), EarlyExit(0.85, "similarity")]
    engine = launching(folder, device)
    with rehearsal(device):
        found = told(engine, GREEDY, modes)
    assert found[0] == told(opened(folder, device, "reference"), GREEDY, modes)[0]
    assert engine.stats().num_drafted_tokens


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_quantized_weights_give_the_choices_of_the_reference(folder, name, device):
    engine = launching(folder, device, name)
    with rehearsal(device):
        found = told(engine, GREEDY)
    wanted = told(opened(folder, device, "reference", name), GREEDY)
    assert found[0] == wanted[0]
    for one, other in zip(found[1], wanted[1], strict=True):
        assert one == pytest.approx(other, abs=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts")
def test_layers_above_the_exit_of_all_rows_read_no_code(folder, bytes_read):
    engine = launching(folder, "cpu", "int8")
    names = ["attention.qkv", "attention.output", "mlp.up", "mlp.down"]
    codes = [
        [block.get_submodule(name).weight.codes for name in names] for block in engine._model.blocks
    ]
    with rehearsal("cpu"):
        engine.add_request(PROMPTS[0], GREEDY, EarlyExit(0.0))
        engine.step()
        before = [[bytes_read(each) for each in own] for own in codes]
        engine.step()
    after = [[bytes_read(each) for each in own] for own in codes]
    read = [[b - a for a, b in zip(*each, strict=True)] for each in zip(before, after, strict=True)]
    assert read[0] == [each.nbytes for each in codes[0]]
    assert read[1:] == [[0] * 4] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts")
def test_layers_above_the_exit_of_all_rows_read_no_weight(folder, bytes_read):
    """The prompts run through all layers; then every row leaves at the first exit."""
    engine = launching(folder, "cpu")
    names = ["attention.qkv", "attention.output", "mlp.up", "mlp.down"]
    blocks = [
        [block.get_submodule(name).weight for name in names] for block in engine._model.blocks
    ]
    with rehearsal("cpu"):
        for prompt in PROMPTS[:2]:
            engine.add_request(prompt, GREEDY, EarlyExit(0.0))
        engine.step()
        before = [[bytes_read(weight) for weight in each] for each in blocks]
        engine.step()
    after = [[bytes_read(weight) for weight in each] for each in blocks]
    read = [[b - a for a, b in zip(*each, strict=True)] for each in zip(before, after, strict=True)]
    assert read[0] == [weight.nbytes for weight in blocks[0]]
    assert read[1:] == [[0] * 4] * 3
