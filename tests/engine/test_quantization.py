"""The whole engine on quantized weights: kernels and reference agree, in any company."""

import pytest
import torch

from multiexit_engine import Contrast, Engine, Exit, Original, SamplingParams
from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.layers.linear import Linear
from multiexit_engine.models import build_model
from multiexit_engine.ops import decoder_blocks
from multiexit_engine.quantization import Quantization, QuantizedWeight, dequantize
from multiexit_engine.runtime.settings import pick_quantization
from tests.models.harness import CASES, CPU, save, transformers_model
from tests.ops.test_decoder_blocks import hidden_after
from tests.tiny import save_gpt2

PROMPTS = [[1, 2, 3], [200, 100, 50, 25, 12, 6, 3], [9] * 40, [77]]
MODES = [Original(), Contrast(6, 2), Exit(4), Contrast("original", 4, alpha=0.01)]
KINDS = pytest.mark.parametrize("kind", ["int8", "int4", "int8-g64", "int4-g64", "fp8"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("gpt2"), sharpness=3.0)


def new_engine(folder, kind, backend="native", **options):
    pytest.importorskip("multiexit_engine._C", reason="the C++ extension is not built")
    return Engine.from_pretrained(
        folder, dtype="float32", device="cpu", backend=backend, quantization=kind,
        prefix_caching=False, **options,
    )  # fmt: skip


def results(engine, prompts, modes, **sampling):
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=20, **sampling), modes)
    return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs]


@KINDS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_kernels_and_reference_give_the_same_tokens(folder, kind, temperature):
    options = {"temperature": temperature, "seed": 5}
    native, reference = (
        [tokens for tokens, _ in results(new_engine(folder, kind, name), PROMPTS, MODES, **options)]
        for name in ("native", "reference")
    )
    assert native == reference


@KINDS
def test_a_request_gives_the_same_bits_alone_in_company_and_in_chunks(folder, kind):
    options = {"temperature": 0.0, "logprobs": 2}
    engine = new_engine(folder, kind)
    together = results(engine, PROMPTS, MODES, **options)
    for prompt, mode, expected in zip(PROMPTS, MODES, together, strict=True):
        assert results(engine, [prompt], mode, **options) == [expected]
    crowded = new_engine(folder, kind, max_num_batched_tokens=5, max_batch_size=5, block_size=4)
    assert results(crowded, PROMPTS, MODES, **options) == together


@KINDS
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_scores_are_those_of_the_reference(folder, kind, mode):
    native, reference = (
        torch.tensor(new_engine(folder, kind, name).score([PROMPTS[1]], mode)[0].token_logprobs[1:])
        for name in ("native", "reference")
    )
    torch.testing.assert_close(native, reference, rtol=0, atol=1e-4)


def test_half_precision_activations_run_beside_quantized_weights(folder):
    for dtype in ("bfloat16", "float16"):
        engine = Engine.from_pretrained(folder, device="cpu", dtype=dtype, quantization="int8")
        assert all(len(ids) == 20 for ids, _ in results(engine, PROMPTS, MODES, ignore_eos=True))


def test_a_tied_head_is_quantized_and_its_embedding_is_not(folder):
    model = build_model(open_checkpoint(folder), CPU, torch.float32, Quantization(4))
    head = model.heads.operands(model.heads.original, torch.ones(1, 64)).weight
    assert isinstance(head, QuantizedWeight)
    stored = open_checkpoint(folder).weights.get("transformer.wte.weight")
    assert torch.equal(model.embedding.tokens, stored)
    half_a_step = head.scales.float().amax() / 2
    assert (dequantize(head) - stored).abs().amax() <= half_a_step * 1.0001


@pytest.mark.parametrize(
    "name", ["gpt2 with every switch", "gpt_neo", "llama with biases, wide heads, tied", "qwen3"]
)
def test_blocks_of_a_family_have_the_bits_of_their_dequantized_weights(tmp_path, name):
    pytest.importorskip("multiexit_engine._C", reason="the C++ extension is not built")
    checkpoint = open_checkpoint(save(transformers_model(*CASES[name]), tmp_path))
    model = build_model(checkpoint, CPU, torch.float32, Quantization(8))
    actual, _ = hidden_after(model, decoder_blocks)
    plain = build_model(checkpoint, CPU, torch.float32)
    linears = [
        [module for module in each.modules() if isinstance(module, Linear)]
        for each in (plain, model)
    ]
    for own, quantized in zip(*linears, strict=True):
        assert isinstance(quantized.weight, QuantizedWeight)
        own.weight.data = dequantize(quantized.weight)
    expected, _ = hidden_after(plain, decoder_blocks)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_devices_without_kernels_are_refused_by_name():
    with pytest.raises(ValueError, match="CPUs and CUDA devices, not on 'mps'"):
        pick_quantization("int8", torch.device("mps"))
