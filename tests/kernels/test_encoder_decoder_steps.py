"""Steps of encoder-decoders in padded pieces, on the GPU's kernels: what the reference gives."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from multiexit_engine import Contrast, EarlyExit, Engine, Original, SamplingParams, SelfSpeculative
from multiexit_engine.ops import assume_device
from tests.engine.families import FAMILIES, SOURCED
from tests.golden import test_bart_golden as bart
from tests.golden import test_t5_golden as t5
from tests.kernels.launched import in_pieces

pytest.importorskip("multiexit_engine.kernels.blocks")

SOURCES = [[5] * 7, [9, 8, 7, 300], [44, 4, 4]]
GREEDY = SamplingParams(max_new_tokens=3, ignore_eos=True)
EARLY = EarlyExit(0.4, layers=(1, 2, 3))
MODES = {
    "early": [EARLY, replace(EARLY, kv="copy"), Original()],
    "drafts": [SelfSpeculative(1, 2), SelfSpeculative(1, 2, Contrast("original", 2))],
}


def rehearsal(device):
    """The kernels of the GPU for tensors that are not on one."""
    return nullcontext() if device == "cuda" else assume_device("cuda")


def told(engine, modes):
    outputs = engine.generate(SOURCES[: len(modes)], GREEDY, modes)
    return [(o.outputs[0].token_ids, o.outputs[0].exit_layers) for o in outputs]


def test_greedy_ids_of_bart_are_those_of_transformers(device):
    engine = Engine.from_pretrained(
        bart.FOLDER / "t1", architecture="bart", device=device, dtype="float32", backend="native"
    )
    pieces = in_pieces(engine, (2, 4))
    call = next(c for c in bart.calls("t1").values() if c["num_beams"] == 1)
    name = next(name for name, own in bart.calls("t1").items() if own is call)
    with rehearsal(device):
        outputs = engine.generate(
            bart.sources("t1")[:3], replace(bart.sampling_of(call), max_new_tokens=4)
        )
    assert pieces.num_captured
    for output, ids in zip(outputs, bart.expected("t1")[f"{name}.sequences"], strict=False):
        # the last one is forced
        assert [bart.START, *output.outputs[0].token_ids[:3]] == ids[:4].tolist()


@pytest.mark.slow
def test_greedy_ids_of_t5_are_ibms(device):
    case = t5.CASES["t5_layer"]
    engine = Engine.from_pretrained(
        t5.FOLDER / case["checkpoint"],
        device=device,
        dtype="float32",
        backend="native",
        vocab_projection_mode=case["vocab_projection_mode"],
        lm_head_layer_indices=case["lm_head_layer_indices_passed"],
    )
    pieces = in_pieces(engine, (4,))
    greedy = {c["config"]: c for c in t5.single_calls("t5_layer") if c["kind"] == "greedy"}
    calls = dict(list(greedy.items())[::4])
    with rehearsal(device):
        outputs = engine.generate(
            [t5.source_of("t5_layer", call) for call in calls.values()],
            [replace(t5.sampling_of(call), max_new_tokens=3) for call in calls.values()],
            [t5.mode_named("t5_layer", config) for config in calls],
        )
    assert pieces.num_captured
    for call, output in zip(calls.values(), outputs, strict=True):
        wanted = t5.expected_of("t5_layer")[call["tensor"]].tolist()
        assert t5.with_start(output) == wanted[:4]


@pytest.mark.parametrize("quantization", [None, pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["early", pytest.param("drafts", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [pytest.param("bart", marks=pytest.mark.slow), "t5"])
def test_launched_steps_give_the_choices_of_the_reference(family, name, quantization, device):
    options = {**FAMILIES[family].options, "dtype": "float32", "max_batch_size": 4}
    options |= {"device": device, "quantization": quantization}
    engine = Engine.from_pretrained(SOURCED[family], backend="native", **options)
    pieces = in_pieces(engine, (4,))
    with rehearsal(device):
        found = told(engine, MODES[name])
    reference = Engine.from_pretrained(SOURCED[family], backend="reference", **options)
    assert pieces.num_captured
    assert found == told(reference, MODES[name])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts")
@pytest.mark.parametrize("family", ["bart", pytest.param("t5", marks=pytest.mark.slow)])
def test_layers_above_the_exit_of_all_rows_read_no_weight(family, bytes_read):
    options = {**FAMILIES[family].options, "dtype": "float32", "max_batch_size": 4}
    engine = Engine.from_pretrained(SOURCED[family], backend="native", device="cpu", **options)
    in_pieces(engine, (2, 4))
    names = ["attention.qkv", "cross_attention.query", "cross_attention.output", "mlp.down"]
    blocks = [
        [block.get_submodule(name).weight for name in names] for block in engine._model.blocks
    ]
    with rehearsal("cpu"):
        engine.add_request(SOURCES[0], GREEDY, EarlyExit(0.0, layers=(1, 2)))
        engine.step()
        before = [[bytes_read(weight) for weight in each] for each in blocks]
        engine.step()
    after = [[bytes_read(weight) for weight in each] for each in blocks]
    read = [[b - a for a, b in zip(*each, strict=True)] for each in zip(before, after, strict=True)]
    assert read[0] == [weight.nbytes for weight in blocks[0]]
    assert read[1:] == [[0] * 4] * (len(blocks) - 1)
