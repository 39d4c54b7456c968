"""Who may ask for layers in one launch, and what is said to the others."""

from types import SimpleNamespace

import pytest
import torch

from multiexit_engine import Engine
from multiexit_engine.ops import decoder_blocks
from multiexit_engine.runtime import settings
from multiexit_engine.runtime.device import persistent
from tests.tiny import save_gpt2

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("gpt2"))


def kernel_for(reason=None, most_rows=4):
    return SimpleNamespace(why_not_served=lambda _: reason, most_rows=lambda *_: most_rows)


@pytest.fixture
def engine(folder):
    return Engine.from_pretrained(folder, device="cpu")


def test_a_cpu_is_refused(folder):
    with pytest.raises(ValueError, match="persistent_blocks=True on 'cpu' with backend='native'"):
        Engine.from_pretrained(folder, device="cpu", backend="native", persistent_blocks=True)


def test_the_reference_is_refused():
    with pytest.raises(ValueError, match="with backend='auto': it is a kernel of GPUs"):
        settings.pick_persistent_blocks(True, CUDA, "auto", SimpleNamespace(encoder=None))


def test_encoder_decoders_are_refused():
    model = SimpleNamespace(encoder=object(), model_type="bart")
    with pytest.raises(ValueError, match="not for encoder-decoders such as 'bart'"):
        settings.pick_persistent_blocks(True, CUDA, "native", model)


def test_a_missing_build_is_named(monkeypatch):
    def missing(name):
        raise ImportError("the CUDA kernels are not built")

    monkeypatch.setattr(persistent.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"kernels are not built; or give persistent_blocks=False"):
        settings.pick_persistent_blocks(True, CUDA, "native", SimpleNamespace(encoder=None))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (kernel_for("its weights are quantized"), "blocks of 'gpt2', since its weights are quan"),
        (kernel_for(most_rows=0), "do not fit the shared memory"),
    ],
)
def test_blocks_that_are_not_served_are_refused(engine, monkeypatch, kernel, message):
    monkeypatch.setattr(persistent, "persistent_kernel", lambda: kernel)
    with pytest.raises(ValueError, match=message):
        persistent.run_in_one_launch(engine._model, 16)


@pytest.mark.parametrize(
    ("rows", "query_lens", "copied", "fits"),
    [
        (1, (1,), None, True),
        (4, (1,) * 4, None, True),
        (5, (1,) * 5, None, False),
        (3, (2, 1), None, False),
        (1, (1,), "rows", False),
    ],
)
def test_few_rows_of_sequences_of_their_own_go_to_the_kernel(rows, query_lens, copied, fits):
    blocks = [SimpleNamespace(most_persistent_rows=4)]
    layout = SimpleNamespace(query_lens=query_lens)
    batch = SimpleNamespace(copied=copied, layout=layout)
    supports = decoder_blocks.backends["cuda"].supports
    assert supports(torch.zeros(rows, 8), blocks, None, batch) is fits


def test_nobody_goes_there_unasked(engine):
    layout = SimpleNamespace(query_lens=(1,))
    batch = SimpleNamespace(copied=None, layout=layout)
    supports = decoder_blocks.backends["cuda"].supports
    assert not supports(torch.zeros(1, 8), list(engine._model.blocks), None, batch)
