"""An engine whose heads are the ring's: the tokens of the CPU's kernels, in all modes it serves."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from multiexit_engine import Contrast, Engine, Exit, Original, SamplingParams
from multiexit_engine.ops import contrast_tokens, head_tokens, operands, registry
from tests.tiny import save_gpt2

PROMPTS = [[1, 2, 3], [200, 100, 50, 25, 12], [9] * 20]
MODES = [Original(), Exit(2), Contrast(4, 2), Contrast("original", 2, alpha=0.01)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = save_gpt2(tmp_path_factory.mktemp("gpt2"), num_layers=4, num_heads=2, exits=(2, 4))
    return Engine.from_pretrained(folder, device="cpu", dtype="bfloat16")


@contextmanager
def heads_on(ring):
    """Hands both ops to the ring inside the block; gives the number of rows of each call."""
    calls, load = [], registry._load

    def loaded(backend):
        if backend.name != "cuda":
            return load(backend)
        function = getattr(ring.heads, backend.target.split(":")[1])

        def counted(hidden, *args, **options):
            calls.append(hidden.shape[0])
            return function(hidden, *args, **options)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operands, "_capability", lambda _: (9, 0))
        patch.setattr(registry, "_load", loaded)
        for op in (head_tokens, contrast_tokens):
            patch.setattr(op, "backends", {"cuda": replace(op.backends["cuda"], device="cpu")})
        yield calls


def ids(engine, prompts, mode, **sampling):
    asked = SamplingParams(max_new_tokens=6, ignore_eos=True, **sampling)
    return [output.outputs[0].token_ids for output in engine.generate(prompts, asked, mode)]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3, "top_k": 0}], ids=str)
def test_the_tokens_are_those_of_the_other_kernels(engine, mode, sampling, ring):
    expected = ids(engine, PROMPTS, mode, **sampling)
    with heads_on(ring) as calls:
        assert ids(engine, PROMPTS, mode, **sampling) == expected
        assert [ids(engine, [p], mode, **sampling)[0] for p in PROMPTS] == expected
    assert set(calls) == {1, 3}
