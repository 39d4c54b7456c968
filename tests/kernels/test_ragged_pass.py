"""Rows leave as the device decides: the host's answers, one wait, no weight read in vain."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from multiexit_engine import Engine, Parallel, SamplingParams
from multiexit_engine.ops import compact_rows, linear
from multiexit_engine.runtime import assembly
from multiexit_engine.runtime.parallel import ragged_pass
from tests.gate_probes import save_probed_elmer
from tests.golden.test_elmer_golden import FOLDER
from tests.kernels.test_elmer import rehearsal

kernels = pytest.importorskip("multiexit_engine.kernels.ragged_blocks")

GENERATOR = torch.Generator().manual_seed(5)
SOURCES = [torch.randint(3, 399, (n,), generator=GENERATOR).tolist() for n in (9, 1, 17, 6, 12)]
MODES = [
    Parallel("soft", length=5),
    Parallel("confidence", "max_prob", 0.4, length=1.5),
    Parallel("prescribed", layers=[1, 3, 2, 1, 1]),
    Parallel("confidence", "entropy", 2.0, layers=(2,), length=(3, 8), gate_bias=False),
    Parallel("confidence", "max_prob", 0.35, length=6, refine=1),
]
UNCUT = SamplingParams(ignore_eos=True)


def opened(device, backend="native", quantization=None):
    options = {"dtype": "float32", "max_batch_size": 8, "quantization": quantization}
    return Engine.from_pretrained(FOLDER / "t1", device=device, backend=backend, **options)


def answers(engine, modes):
    outputs = engine.generate(SOURCES[: len(modes)], UNCUT, modes)
    return [(o.outputs[0].token_ids, o.outputs[0].exit_layers) for o in outputs]


@pytest.fixture
def waits(monkeypatch):
    """How many tensors came to the host each time that it waited."""
    found = []
    to_host = ragged_pass.to_host

    def counted(tensors):
        found.append(len(tensors))
        return to_host(tensors)

    monkeypatch.setattr(ragged_pass, "to_host", counted)
    return found


def test_mixed_modes_give_the_answers_and_the_work_of_the_host(device, waits):
    engine, reference = opened(device), opened("cpu", "reference")
    with rehearsal(device):
        found = answers(engine, MODES)
    assert found == answers(reference, MODES)
    assert engine.stats().rows_per_layer == reference.stats().rows_per_layer
    assert engine.stats().keyed_rows_per_layer == reference.stats().keyed_rows_per_layer
    # the pass and its refinement
    assert len(waits) == 2


@pytest.mark.parametrize("name", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_quantized_weights_give_the_answers_of_the_host(device, waits, name):
    engine, reference = opened(device, "native", name), opened("cpu", "reference", name)
    modes = [replace(mode, refine=0) for mode in MODES[1:3]]
    with rehearsal(device):
        found = answers(engine, modes)
    assert found == answers(reference, modes)
    assert engine.stats().rows_per_layer == reference.stats().rows_per_layer
    assert len(waits) == 1


def test_pieces_with_padding_give_the_answers_and_the_work_of_the_host(device, monkeypatch):
    monkeypatch.setattr(assembly, "new_capture", lambda config: lambda call: call)
    reference = opened("cpu", "reference")
    config = replace(reference.config, device=torch.device(device), backend="native")
    engine = Engine(reference.checkpoint, replace(config, cuda_graphs=(80,)), None)
    modes = [replace(mode, refine=0) for mode in MODES]
    with rehearsal(device):
        found = answers(engine, modes)
    assert found == answers(reference, modes)
    assert engine.stats().rows_per_layer == reference.stats().rows_per_layer


def test_probes_hold_back_the_same_rows_as_on_the_host(device, waits, tmp_path):
    folder = save_probed_elmer(tmp_path / "model")
    options = {"dtype": "float32", "max_batch_size": 8}
    engine = Engine.from_pretrained(folder, device=device, **options)
    reference = Engine.from_pretrained(folder, backend="reference", **options)
    modes = [
        Parallel("confidence", "max_prob", 0.3, length=6, gate_chance=0.25, gate_gain=0),
        Parallel(
            "confidence", "entropy", 2.5, length=7, gate_bias=False, gate_chance=0.5, gate_gain=4
        ),
        Parallel("confidence", "max_prob", 0.3, layers=(1, 2), length=5),
    ]
    with rehearsal(device):
        found = answers(engine, modes)
    assert found == answers(reference, modes)
    tested = engine.stats().tested_rows_per_layer
    assert tested == reference.stats().tested_rows_per_layer
    assert 0 < sum(tested) < sum(engine.stats().rows_per_layer[:-1])
    assert len(waits) == 1


class NoQuestions(TorchDispatchMode):
    """Raises where a number of a tensor, or a length that depends on one, is asked for."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in self.ASKING, f"the host waits for {name}"
        if name == "index":
            kinds = [each.dtype for each in args[1] if each is not None]
            assert torch.bool not in kinds, "the host waits to know how many rows there are"
        return function(*args, **(kwargs or {}))


def test_a_pass_asks_the_device_nothing_before_its_end(device, waits, monkeypatch):
    engine = opened(device)
    told = torch.Tensor.tolist

    def tolist(tensor):
        assert waits or tensor.dtype == torch.bool, "numbers on the way"
        return told(tensor)

    with rehearsal(device):
        expected = answers(engine, MODES[1:2])
        waits.clear()
        monkeypatch.setattr(torch.Tensor, "tolist", tolist)
        with NoQuestions():
            assert answers(engine, MODES[1:2]) == expected
    assert len(waits) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts")
@pytest.mark.parametrize(("count", "times"), [(0, 0), (1, 1), (64, 1), (65, 2)])
def test_weights_are_read_for_blocks_of_rows_that_are_listed(count, times, bytes_read):
    x = torch.full((200, 600), math.nan, dtype=torch.bfloat16)
    is_listed = torch.arange(200) % 3 == 0 if count > 60 else torch.arange(200) >= 200 - count
    is_listed &= is_listed.cumsum(0) <= count
    x[is_listed] = 1.0
    weight = torch.ones(70, 600, dtype=torch.bfloat16)
    listed = compact_rows.implementation("triton")(is_listed)
    found = kernels.listed_linear(x, weight, None, listed)
    assert int(is_listed.sum()) == count
    assert torch.equal(found[is_listed], linear.reference(x[is_listed], weight, None))
    assert bytes_read(weight) == times * weight.nbytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts")
def test_layers_above_the_last_row_read_no_weight(bytes_read):
    engine = opened("cpu")
    blocks = list(engine._model.blocks)
    with rehearsal("cpu"):
        answers(engine, [Parallel("confidence", "max_prob", 0.0, length=16)])
    matrices = [
        [b.attention.output.weight, b.cross_attention.query.weight, b.mlp.up.weight] for b in blocks
    ]
    assert all(bytes_read(weight) == weight.nbytes for weight in matrices[0][1:])
    assert [bytes_read(weight) for each in matrices[1:] for weight in each] == [0] * 9
    assert [bytes_read(block.attention.qkv.weight) for block in blocks[1:]] == [0, 0, 0]
    cross = engine._model.cross.weight
    assert bytes_read(cross) == cross.nbytes / len(blocks)
    head = engine._model.predict(torch.zeros(1, 64)).weight
    assert bytes_read(head) == head.nbytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="the order of a GPU is its own")
def test_the_order_of_programs_decides_nothing():
    from tests.kernels.interpreter import program_order

    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(n, 1100, generator=generator) for n in (90, 40))
    is_listed = torch.rand(90, generator=generator) < 0.5
    results = []
    for seed in (None, 1, 2):
        with program_order(seed):
            listed = compact_rows.implementation("triton")(is_listed)
            results.append(kernels.listed_linear(x, weight, None, listed)[is_listed])
    assert all(torch.equal(result, results[0]) for result in results)
