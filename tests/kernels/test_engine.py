"""The whole engine on the GPU's kernels, interpreted where there is no GPU: the reference's ids."""

from contextlib import nullcontext

import pytest

from multiexit_engine import (
    Contrast,
    DoLa,
    EarlyExit,
    Engine,
    Exit,
    Original,
    SamplingParams,
    SelfSpeculative,
)
from multiexit_engine.ops import assume_device
from multiexit_engine.structured import StructuredOutputs
from tests.tiny import save_gpt2

pytest.importorskip("multiexit_engine.kernels.heads")

PROMPTS = [[1, 2, 3], [200, 100, 50, 25, 12], [9] * 20, [77], [5, 6]]
MIXED = [Original(), Exit(2), Contrast(4, 2), Contrast("original", 2, alpha=0.01), Exit(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("gpt2"), num_layers=4, num_heads=2, exits=(1, 2, 4))


def ids(engine, prompts, modes, **sampling):
    outputs = engine.generate(prompts, SamplingParams(ignore_eos=True, **sampling), modes)
    return [output.outputs[0].token_ids for output in outputs]


def on_kernels(folder, device, dtype="float32", **options):
    return Engine.from_pretrained(folder, device=device, dtype=dtype, backend="native", **options)


def rehearsal(device):
    """The kernels of the GPU for tensors that are not on one."""
    return nullcontext() if device == "cuda" else assume_device("cuda")


def expected(folder, prompts, modes, **sampling):
    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32", backend="reference")
    return ids(engine, prompts, modes, **sampling)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mixed_batch_gives_the_ids_of_the_reference(folder, temperature, device):
    asked = {"max_new_tokens": 3, "temperature": temperature, "seed": 3, "top_k": 0}
    with rehearsal(device):
        found = ids(on_kernels(folder, device), PROMPTS, MIXED, **asked)
    assert found == expected(folder, PROMPTS, MIXED, **asked)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_dola_beside_another_mode_gives_the_ids_of_the_reference(folder, temperature, device):
    modes = [DoLa((0, 1, 3)), Contrast(4, 2), DoLa((2,))]
    asked = {"max_new_tokens": 3, "temperature": temperature, "seed": 5, "top_k": 0}
    with rehearsal(device):
        found = ids(on_kernels(folder, device), PROMPTS[:3], modes, **asked)
    assert found == expected(folder, PROMPTS[:3], modes, **asked)


def test_cached_prefixes_and_chunks_change_nothing(folder, device):
    prompts = [[*range(40), 1], [*range(40), 2]]
    engine = on_kernels(folder, device, max_num_batched_tokens=24)
    with rehearsal(device):
        found = [ids(engine, [p], Contrast(4, 2), max_new_tokens=2)[0] for p in prompts]
    assert engine.stats().prefix_hit_tokens == 32
    assert found == expected(folder, prompts, Contrast(4, 2), max_new_tokens=2)


@pytest.mark.parametrize(
    "mode",
    [
        SelfSpeculative(2, draft_len=2, target=Contrast(4, 2)),
        SelfSpeculative(2, draft_len=2, tree=2),
        EarlyExit(0.5, "max_prob"),
    ],
    ids=("SelfSpeculative", "tree", "EarlyExit"),
)
def test_modes_with_exits_on_the_way_give_the_ids_of_the_reference(folder, mode, device):
    with rehearsal(device):
        found = ids(on_kernels(folder, device), PROMPTS[:2], mode, max_new_tokens=3)
    assert found == expected(folder, PROMPTS[:2], mode, max_new_tokens=3)


@pytest.fixture
def launched(monkeypatch):
    """The names of the launches of heads, in order."""
    kernels = pytest.importorskip("multiexit_engine.kernels.heads")
    names = []
    for name in ("head_kernel", "head_finish_kernel", "contrast_finish_kernel"):
        monkeypatch.setattr(kernels, name, Watched(getattr(kernels, name), name, names))
    return names


@pytest.mark.parametrize("mode", [Contrast(4, 2), Contrast(4, 2, min_candidates=3)], ids=str)
def test_a_contrast_is_two_launches(folder, mode, device, launched):
    with rehearsal(device):
        ids(on_kernels(folder, device), PROMPTS[:1], mode, max_new_tokens=1)
    assert launched == ["head_kernel", "contrast_finish_kernel"]


def test_rows_of_one_head_are_two_launches_whatever_their_modes(folder, device, launched):
    modes = [Exit(4), Contrast(4, 2), Contrast(4, 1), Contrast(4, 2, alpha=0.5)]
    with rehearsal(device):
        ids(on_kernels(folder, device), [[1], [2], [3], [4]], modes, max_new_tokens=1)
    assert launched == ["head_kernel", "contrast_finish_kernel"]


def test_exits_that_share_the_models_own_head_are_two_launches(tmp_path, device, launched):
    folder = save_gpt2(tmp_path, num_layers=4, num_heads=2)
    shared = {
        "vocab_projection_mode": "shared_projection_direct",
        "lm_head_layer_indices": (1, 2, 4),
    }
    modes = [Exit(1), Contrast(4, 2), Original(), Contrast("original", 1), Exit(2)]
    prompts = [[1], [2], [3], [4], [5]]
    with rehearsal(device):
        found = ids(on_kernels(folder, device, **shared), prompts, modes, max_new_tokens=1)
    assert launched == ["head_kernel", "contrast_finish_kernel"]
    engine = Engine.from_pretrained(folder, device="cpu", backend="reference", **shared)
    assert found == ids(engine, prompts, modes, max_new_tokens=1)


class Watched:
    def __init__(self, kernel, name, launched):
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


def beside_reference(folder, device, sampling):
    """Outputs of rows that share a head in modes of all kinds, of the kernels and of PyTorch."""
    modes = [Contrast(4, 2), Contrast(4, 1), Exit(4), Contrast(4, 2, alpha=0.5), Contrast(4, 2)]
    with rehearsal(device):
        outputs = on_kernels(folder, device).generate(PROMPTS, sampling, modes)
    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32", backend="reference")
    return outputs, engine.generate(PROMPTS, sampling, modes)


def token_ids(outputs):
    return [output.outputs[0].token_ids for output in outputs]


EDITING = [
    SamplingParams(max_new_tokens=3, ignore_eos=True, repetition_penalty=1.7),
    SamplingParams(max_new_tokens=3, ignore_eos=True, presence_penalty=3.0, frequency_penalty=1.0),
    SamplingParams(max_new_tokens=3, min_new_tokens=3, logit_bias={7: 30.0, 8: 29.0, 256: 40.0}),
    SamplingParams(
        max_new_tokens=3, ignore_eos=True, no_repeat_ngram_size=1, temperature=1.0, top_k=0, seed=1
    ),
    SamplingParams(max_new_tokens=3, ignore_eos=True),
]


def test_penalties_biases_and_bans_are_taken_by_the_kernels(folder, device, launched):
    """As are rows without any beside them: two launches for each matrix in each step."""
    outputs, expected = beside_reference(folder, device, EDITING)
    assert launched == ["head_kernel", "contrast_finish_kernel"] * 3
    assert token_ids(outputs) == token_ids(expected)


NARROWING = [
    SamplingParams(max_new_tokens=3, ignore_eos=True, temperature=1.0, seed=1),
    SamplingParams(max_new_tokens=3, ignore_eos=True, temperature=1.3, top_k=0, top_p=0.9, seed=2),
    SamplingParams(max_new_tokens=3, ignore_eos=True, temperature=0.7, top_k=9, min_p=0.1, seed=3),
    SamplingParams(
        max_new_tokens=3, ignore_eos=True, temperature=1.0, repetition_penalty=1.7, seed=4
    ),
    SamplingParams(max_new_tokens=3, ignore_eos=True),
]


def test_what_sampling_is_by_default_is_done_by_the_kernels(folder, device, launched):
    """top_k=50, and top_p and min_p, beside rows with penalties and greedy ones."""
    outputs, expected = beside_reference(folder, device, NARROWING)
    assert launched == ["head_kernel", "contrast_finish_kernel"] * 3
    assert token_ids(outputs) == token_ids(expected)


LISTING = [
    SamplingParams(max_new_tokens=2, ignore_eos=True, logprobs=3),
    SamplingParams(max_new_tokens=2, ignore_eos=True, logprobs=0, temperature=1.3, top_k=0, seed=2),
    SamplingParams(max_new_tokens=2, ignore_eos=True, logprobs=20, repetition_penalty=1.7),
    SamplingParams(max_new_tokens=2, ignore_eos=True, logprobs=2, temperature=1.0, seed=3),
    SamplingParams(max_new_tokens=2, ignore_eos=True),
]


def test_logprobs_are_told_by_the_kernels(folder, device, launched):
    """Beside rows with edits, narrowed ones and such as want a token alone."""
    outputs, expected = beside_reference(folder, device, LISTING)
    assert launched == ["head_kernel", "contrast_finish_kernel"] * 2
    assert token_ids(outputs) == token_ids(expected)
    for found, wanted in zip(outputs, expected, strict=True):
        assert_same_logprobs(found.outputs[0].logprobs, wanted.outputs[0].logprobs)


def assert_same_logprobs(found, wanted):
    for own, other in zip(found or [], wanted or [], strict=True):
        assert list(own) == list(other)
        for token, one in own.items():
            assert one.rank == other[token].rank
            assert one.logprob == pytest.approx(other[token].logprob, abs=1e-4)


def test_biases_count_where_some_rows_leave_early(folder, device):
    sampling = [
        SamplingParams(max_new_tokens=3, logit_bias={7 + i: 60.0}, ignore_eos=True)
        for i in range(2)
    ]
    modes = [Original(), EarlyExit(0.0, "max_prob")]
    with rehearsal(device):
        outputs = on_kernels(folder, device).generate(PROMPTS[:2], sampling, modes)
    assert [output.outputs[0].token_ids for output in outputs] == [[7] * 3, [8] * 3]


def test_grammars_are_masks_inside_the_kernels(folder, device, launched):
    pytest.importorskip("llguidance")
    form = StructuredOutputs(regex="[ab]{2}")
    sampling = SamplingParams(max_new_tokens=4, structured_outputs=form)
    modes = [Contrast(4, 2), Exit(4)]
    with rehearsal(device):
        outputs = on_kernels(folder, device).generate(PROMPTS[:2], sampling, modes)
    assert set(launched) == {"head_kernel", "contrast_finish_kernel"}
    assert all(set(output.outputs[0].text) <= set("ab") for output in outputs)
    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32", backend="reference")
    expected = engine.generate(PROMPTS[:2], sampling, modes)
    assert [o.outputs[0].text for o in outputs] == [o.outputs[0].text for o in expected]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4-g64", "fp8"])
def test_quantized_weights_give_the_ids_of_the_reference(folder, name, device, launched):
    """Their heads are read by the fused kernels, too."""
    with rehearsal(device):
        found = ids(
            on_kernels(folder, device, quantization=name), PROMPTS[:2], MIXED[1:3], max_new_tokens=2
        )
    assert "head_kernel" in launched
    engine = Engine.from_pretrained(
        folder, device="cpu", dtype="float32", backend="reference", quantization=name
    )
    assert found == ids(engine, PROMPTS[:2], MIXED[1:3], max_new_tokens=2)
