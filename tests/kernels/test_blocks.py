"""Spans of blocks on the GPU's kernels, against the modules; ``tests/ops`` has every family."""

import itertools
from functools import partial

import pytest
import torch

from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.models import build_model
from multiexit_engine.ops import assume_device, decoder_blocks, use_backend
from tests.models.harness import CASES, ENCODER_DECODERS, save, transformers_model
from tests.models.test_encoder_decoders import run_in_chunks
from tests.models.test_encoder_decoders import transformers_model as transformers_seq2seq
from tests.ops.test_decoder_blocks import hidden_after

blocks = pytest.importorskip("multiexit_engine.kernels.blocks")
attention, kernels, products, qkv = (
    pytest.importorskip(f"multiexit_engine.kernels.{name}")
    for name in ("attention", "launch", "products", "qkv")
)

TEXTS = [[5, 17, 99], [9, 8]]
STEPS = [[(0, 2), (0, 1)], [(2, 3), (1, 2)]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/ops runs them on the GPU")
@pytest.mark.parametrize("name", ["gpt2", "llama 3", "qwen3 with biases"])
def test_two_blocks_equal_the_modules(name, tmp_path):
    checkpoint = open_checkpoint(save(transformers_model(*CASES[name]), tmp_path))
    model = build_model(checkpoint, torch.device("cpu"), torch.float32)
    with use_backend("reference"):
        expected, _ = hidden_after(
            model, decoder_blocks.reference, TEXTS, STEPS, blocks=slice(0, 2)
        )
    found, _ = hidden_after(model, blocks.decoder_blocks, TEXTS, STEPS, blocks=slice(0, 2))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * float(other.abs().max()), rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors are the CPU's")
def test_blocks_with_sources_and_norms_behind_equal_the_modules(tmp_path):
    folder = save(transformers_seq2seq(*ENCODER_DECODERS["bart"]), tmp_path)
    model = build_model(open_checkpoint(folder), torch.device("cpu"), torch.float32)
    with use_backend("reference"):
        expected = run_in_chunks(model, 5, [0, 1])
    with assume_device("cuda"):
        found = run_in_chunks(model, 5, [0, 1])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * float(other.abs().max()), rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are counted where they are few")
@pytest.mark.parametrize("parts", [1, 2])
def test_a_block_of_few_rows_takes_a_launch_for_each_part_and_one_to_merge(
    parts, monkeypatch, tmp_path
):
    checkpoint = open_checkpoint(save(transformers_model(*CASES["gpt2"]), tmp_path))
    model = build_model(checkpoint, torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(attention, "MIN_CHUNK", 16)
    launches = []
    launch = kernels.triton.runtime.interpreter.InterpretedFunction.run

    def counted(self, *args, **kwargs):
        launches.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(kernels.triton.runtime.interpreter.InterpretedFunction, "run", counted)
    text = [[5] * (16 * parts)]
    length = len(text[0])
    steps = [[(0, length - 1)], [(length - 1, length)]]
    hidden_after(model, blocks.decoder_blocks, text, steps, blocks=slice(0, 1))
    merge = ["merge_kernel"] if parts > 1 else []
    products = ["product_kernel"] * 3
    assert launches[-5 - len(merge) :] == ["qkv_kernel", "short_kernel", *merge, *products]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels take what is asked for")
@pytest.mark.parametrize("has_more", [False, True], ids=["then nothing", "then the head"])
def test_a_launch_asks_for_what_the_launch_after_the_next_reads(has_more, monkeypatch, tmp_path):
    checkpoint = open_checkpoint(save(transformers_model(*CASES["llama 3"]), tmp_path))
    model = build_model(checkpoint, torch.device("cpu"), torch.float32)
    asked = []

    def recorded(weight, device):
        asked.append(weight)
        return None, 0

    for module in (attention, products, qkv):
        monkeypatch.setattr(module, "fetched", recorded)
    head = torch.zeros(64, 32) if has_more else None
    span = partial(blocks.decoder_blocks, then=head)
    hidden_after(model, span, [[5]], [[(0, 1)]], blocks=slice(0, 2))
    parts = [
        [b.attention.output, b.mlp.gate_up, b.mlp.down, c and c.attention.qkv, None]
        for b, c in itertools.pairwise([*model.blocks[:2], None])
    ]
    expected = [part and part.weight for row in parts for part in row]
    expected[-2] = head
    assert len(asked) == len(expected)
    assert all(one is other for one, other in zip(asked, expected, strict=True))
