"""After a warm-up, requests of the mode launch no kernel that a GPU would have to compile first."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from multiexit_engine import Contrast, EarlyExit, Engine, Original, SamplingParams, SelfSpeculative
from multiexit_engine.ops import assume_device
from tests.engine.families import FAMILIES, SOURCED
from tests.kernels.launched import in_pieces
from tests.tiny import save_gpt2

pytest.importorskip("multiexit_engine.kernels.heads")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter tells what is launched"),
]

GREEDY = SamplingParams(max_new_tokens=4, ignore_eos=True)
DRAWN = SamplingParams(max_new_tokens=4, ignore_eos=True, temperature=0.9, top_p=0.8, seed=3)
PROMPTS = [[1, 2, 3], [200, 100, 50, 25, 12, 7, 7], [9] * 20]
SOURCES = [[5] * 7, [9, 8, 7, 300, 4], [44] * 20]
MODES = [Original(), Contrast(4, 2), EarlyExit(0.05), SelfSpeculative(2, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("gpt2"), num_layers=4, num_heads=2, exits=(2, 4))


@pytest.fixture
def compiled(monkeypatch):
    """What Triton would compile since the test began: kernels, by what it specialises them for."""
    from triton.runtime.interpreter import InterpretedFunction

    found, run = set(), InterpretedFunction.run

    def noted(self, *args, grid, warmup, **kwargs):
        found.add(_variant(self, args, kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    return found


def _variant(kernel, args, kwargs):
    parameters = inspect.signature(kernel.fn).parameters
    spared = kernel.kwargs.get("do_not_specialize") or ()
    values = inspect.signature(kernel.fn).bind(
        *args, **{name: value for name, value in kwargs.items() if name in parameters}
    )
    own = []
    for name, value in values.arguments.items():
        if "constexpr" in str(parameters[name].annotation):
            own.append((name, value))
        elif isinstance(value, torch.Tensor):
            own.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and name not in spared:
            own.append((name, value == 1, value % 16 == 0))
        else:
            own.append((name, type(value)))
    options = {name: value for name, value in kwargs.items() if name not in parameters}
    return kernel.fn.__name__, tuple(own), tuple(sorted(options.items()))


def assert_warm(folder, mode, prompts, compiled, **options):
    """Requests of a warm engine capture nothing, and launch what the warm-up launched."""
    small = {"dtype": "float32", "max_model_len": 64, "max_batch_size": 4, "device": "cpu"}
    opened = Engine.from_pretrained(folder, **small, **options)
    config = replace(opened.config, cuda_graphs=(1, 4), backend="native")
    engine = Engine(opened.checkpoint, config, None)
    pieces = in_pieces(engine, (1, 4))
    with assume_device("cuda"):
        engine.warm_up(mode)
        known, num_captured = set(compiled), pieces.num_captured
        engine.generate(prompts[:1], GREEDY, mode)
        engine.generate(prompts, [GREEDY, DRAWN, GREEDY], mode)
    assert known and pieces.num_captured == num_captured
    assert not [variant for variant in compiled if variant not in known]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: type(mode).__name__)
def test_requests_of_a_warm_mode_launch_known_kernels(folder, mode, compiled):
    assert_warm(folder, mode, PROMPTS, compiled)


@pytest.mark.parametrize("family", SOURCED)
@pytest.mark.parametrize(
    "mode",
    [Contrast("original", 2), EarlyExit(0.4, layers=(1, 2, 3))],
    ids=lambda mode: type(mode).__name__,
)
def test_so_do_requests_with_sources(family, mode, compiled):
    assert_warm(SOURCED[family], mode, SOURCES, compiled, **FAMILIES[family].options)
