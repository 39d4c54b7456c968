"""The whole engine on the compiled kernels: the same bits in any company, on any path."""

import pytest

from multiexit_engine import Contrast, DoLa, Engine, Exit, Original, SamplingParams
from multiexit_engine.layers import rough_heads
from tests.tiny import save_gpt2

PROMPTS = [[1, 2, 3], [200, 100, 50, 25, 12, 6, 3], [9] * 40, [77], [5, 6], [8] * 9]
MODES = [
    Original(),
    Contrast(6, 2),
    Exit(4),
    Contrast("original", 4, alpha=0.01),
    DoLa((0, 2, 4)),
    DoLa((2, 4), relative_top=0.01, jsd="reference", heads="exits"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("gpt2"), sharpness=3.0)


def new_engine(folder, dtype="float32", **options):
    return Engine.from_pretrained(
        folder, dtype=dtype, device="cpu", backend="native", prefix_caching=False, **options
    )


def results(engine, prompts, modes, **sampling):
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=20, **sampling), modes)
    return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_the_same_whether_or_not_logprobs_are_asked_for(folder, temperature):
    engine = new_engine(folder)
    options = {"temperature": temperature, "seed": 11, "top_k": 0}
    bare = [tokens for tokens, _ in results(engine, PROMPTS, MODES, **options)]
    assert bare == [t for t, _ in results(engine, PROMPTS, MODES, **options, logprobs=0)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_codes_of_heads_change_no_token(folder, monkeypatch, temperature):
    options = {"temperature": temperature, "seed": 11, "top_k": 0}
    expected = results(new_engine(folder), PROMPTS, MODES, **options)
    monkeypatch.setattr(rough_heads, "LEAST_NUMBERS", 1)
    monkeypatch.setattr(rough_heads, "are_codes_fast", lambda: True)
    asked, tokens = [], rough_heads.RoughHeads.tokens

    def note(self, rows, *head):
        found = tokens(self, rows, *head)
        asked.append((rows.is_contrasted, found is not None and bool((found[1] == 0).all())))
        return found

    monkeypatch.setattr(rough_heads.RoughHeads, "tokens", note)
    engine = new_engine(folder)
    assert results(engine, PROMPTS, MODES, **options) == expected
    for prompt, mode, own in zip(PROMPTS, MODES, expected, strict=True):
        assert results(engine, [prompt], mode, **options) == [own]
    # without an exact look at any row
    assert {(False, True), (True, True)} <= set(asked)
