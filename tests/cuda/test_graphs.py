"""Joined graphs on a model of CUDA's calls, and on a GPU where one and the library are there."""

from __future__ import annotations

import ctypes

import pytest

from multiexit_engine import EarlyExit, Engine, Original, Parallel, SamplingParams
from multiexit_engine._cuda.graphs import GraphLibrary
from tests.golden.test_elmer_golden import FOLDER
from tests.runtime.exit_models import own_heads


class Model:
    """Captured graphs of one node, each of which appends its digit to ``sum``."""

    def __init__(self, fibers) -> None:
        self.path = fibers.library.path
        self.library = GraphLibrary(self.path)
        self._host = ctypes.CDLL(str(self.path))
        self._host.multiexit_host_graph.restype = ctypes.c_uint64
        self._sum = ctypes.c_int(0)

    def graph(self, digit: int) -> int:
        return self._host.multiexit_host_graph(ctypes.byref(self._sum), digit)

    def run(self, joined) -> int:
        self._sum.value = 0
        joined.launch(0)
        return self._sum.value

    def number(self, name: str) -> ctypes.c_int:
        return ctypes.c_int.in_dll(self._host, f"multiexit_host_{name}")


@pytest.fixture
def model(fibers) -> Model:
    return Model(fibers)


def test_parts_run_in_their_order_and_those_without_counts_are_passed_over(model):
    first, second = ctypes.c_int(0), ctypes.c_int(0)
    counts = [ctypes.addressof(first), ctypes.addressof(second)]
    joined = model.library.join(
        [(model.graph(1), ()), (model.graph(2), counts[:1]), (model.graph(3), ()),
         (model.graph(4), counts), (model.graph(5), ())]
    )  # fmt: skip
    found = []
    for first.value, second.value in ((0, 0), (3, 0), (0, 1), (0, 0), (2, 2)):
        found.append(model.run(joined))
    assert found == [135, 12345, 1345, 135, 12345]


def test_empty_parts_are_nothing(model):
    none = ctypes.c_int(1)
    address = ctypes.addressof(none)
    joined = model.library.join([(model.graph(0), ()), (model.graph(0), [address]),
                                 (model.graph(7), [address]), (model.graph(0), ())])  # fmt: skip
    assert model.run(joined) == 7


def test_nothing_is_kept_of_a_graph_that_is_given_up(model):
    before = model.number("graphs").value
    joined = model.library.join([(model.graph(1), ())])
    assert model.number("graphs").value == before + 1
    del joined
    assert model.number("graphs").value == before
    with pytest.raises(RuntimeError, match="conditional graph nodes: invalid argument"):
        model.library.join([(0, ())])
    assert model.number("graphs").value == before


def test_an_old_driver_is_named(model):
    version = model.number("driver")
    version.value = 12030
    try:
        with pytest.raises(RuntimeError, match=r"no driver, or one of a CUDA before 12\.4"):
            GraphLibrary(model.path)
    finally:
        version.value = 13000


def outputs_by_nodes(folder, prompts, modes, sampling, **options):
    """What a GPU finds without conditional nodes, then twice with them."""
    kept = {"device": "cuda", "backend": "native", **options}
    found = []
    for wanted, rounds in ((False, 1), (True, 2)):
        engine = Engine.from_pretrained(folder, **kept, conditional_nodes=wanted)
        for _ in range(rounds):
            outputs = [o.outputs[0] for o in engine.generate(prompts, sampling, modes)]
            found.append([(o.token_ids, o.exit_layers) for o in outputs])
    return found


@pytest.mark.parametrize("kv", ["recompute", "copy"])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_tokens_on_a_gpu_are_those_without_conditional_nodes(built, tmp_path, kv, threshold):
    folder, early = own_heads(tmp_path / "gpt2"), EarlyExit(threshold, kv=kv)
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
    prompts = [[1, 2, 3], [200, 100, 50, 25, 12], [9] * 20, [77]]
    for modes in ([early] * 4, [early, early, Original(), early]):
        sizes = {"cuda_graphs": (1, 4), "max_batch_size": 4}
        plain, *conditional = outputs_by_nodes(folder, prompts, modes, sampling, **sizes)
        assert conditional == [plain, plain]


@pytest.mark.parametrize("threshold", [0.0, 0.35])
def test_answers_on_a_gpu_are_those_without_conditional_nodes(built, threshold):
    mode = Parallel("confidence", "max_prob", threshold, length=6)
    prompts = [[5, 6, 7, 8], [9], [20, 30, 40]]
    plain, *conditional = outputs_by_nodes(
        FOLDER / "t1", prompts, mode, SamplingParams(), cuda_graphs=(64,)
    )
    assert conditional == [plain, plain]
