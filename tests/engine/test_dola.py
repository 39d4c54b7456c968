"""DoLa through the whole engine: what rules tokens out must not get in anybody's way."""

import math

import pytest
import torch

from multiexit_engine import DoLa, Engine, FinishReason, SamplingParams, SelfSpeculative
from tests.tiny import save_gpt2

PROMPT = [5, 100, 7, 42]


def test_score_gives_minus_infinity_outside_the_plausible_set(engine):
    (found,) = engine.score([PROMPT], decoding=DoLa((0, 2)))
    expected = engine.logits(PROMPT, DoLa((0, 2)))[:-1].log_softmax(-1)
    tokens = torch.tensor(PROMPT[1:])
    assert found.token_logprobs[1:] == pytest.approx(
        expected.gather(1, tokens[:, None])[:, 0].tolist(), abs=1e-5
    )
    assert -math.inf in found.token_logprobs[1:]


def test_without_a_threshold_every_text_has_a_score(engine):
    (found,) = engine.score([PROMPT], decoding=DoLa((0, 2), relative_top=0.0))
    assert math.isfinite(found.total)


def test_logprobs_are_normalised(engine):
    params = SamplingParams(max_new_tokens=3, logprobs=-1)
    completion = engine.generate(PROMPT, params, DoLa("high"))[0].outputs[0]
    for alternatives in completion.logprobs:
        total = sum(math.exp(found.logprob) for found in alternatives.values())
        assert total == pytest.approx(1.0, abs=1e-5)


def test_samples_stay_in_the_plausible_set(engine):
    params = SamplingParams(max_new_tokens=1, temperature=3.0, top_k=0, n=40, seed=1)
    mode = DoLa((0, 1), relative_top=0.5)
    plausible = engine.logits(PROMPT, mode)[-1].isfinite()
    drawn = {c.token_ids[0] for c in engine.generate(PROMPT, params, mode)[0].outputs}
    assert len(drawn) > 1 and all(plausible[token] for token in drawn)


@pytest.mark.parametrize("num_beams", [2, 5])
def test_beams_where_one_token_is_left_find_the_greedy_text(engine, num_beams):
    mode = DoLa((0, 1), relative_top=1.0)
    greedy = engine.generate(PROMPT, SamplingParams(max_new_tokens=6), mode)[0]
    params = SamplingParams(max_new_tokens=6, num_beams=num_beams, n=2)
    best, other = engine.generate(PROMPT, params, mode)[0].outputs
    assert best.token_ids == greedy.outputs[0].token_ids and best.cumulative_logprob == 0.0
    assert other.cumulative_logprob < -1e6


def test_a_prefix_from_the_cache_changes_nothing(folder):
    engine = Engine.from_pretrained(folder, dtype="float32", device="cpu")
    prompt, params = list(range(70)), SamplingParams(max_new_tokens=8)
    first = engine.generate(prompt, params, DoLa((0, 3)))[0]
    second = engine.generate(prompt, params, DoLa((0, 3)))[0]
    assert second.num_cached_tokens > 0
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_give_finite_scores(tmp_path, dtype):
    engine = Engine.from_pretrained(save_gpt2(tmp_path), dtype=dtype, device="cpu")
    scores = engine.logits(PROMPT, DoLa((0, 2, 4), relative_top=0.0))
    assert scores.dtype == torch.float32 and scores.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_ban_of_all_plausible_tokens_ends_its_own_request_alone(engine, temperature):
    mode = DoLa((0, 2), relative_top=1.0)
    only = int(engine.logits(PROMPT, mode)[-1].argmax())
    banned = SamplingParams(max_new_tokens=3, bad_words=((only,),), temperature=temperature)
    failed, other = engine.generate([PROMPT, PROMPT], [banned, SamplingParams()], mode)
    assert failed.outputs[0].finish_reason is FinishReason.ERROR
    assert "leave no token to choose" in failed.error and failed.outputs[0].token_ids == []
    assert other.outputs[0].token_ids[0] == only and other.error is None


@pytest.mark.parametrize("jsd", ["exact", "reference"])
def test_the_output_tells_which_layer_each_token_was_contrasted_with(engine, jsd):
    options = {"relative_top": 0.0, "jsd": jsd, "heads": "exits"}
    mode = DoLa((2, 4), **options)
    params = SamplingParams(max_new_tokens=30, temperature=1.0, seed=1)
    (completion,) = engine.generate(PROMPT, params, mode)[0].outputs
    assert len(completion.premature_layers) == 30
    assert set(completion.premature_layers) == {2, 4}
    ids = PROMPT + completion.token_ids[:-1]
    alone = {layer: engine.logits(ids, DoLa((layer,), **options)) for layer in (2, 4)}
    scores = engine.logits(ids, mode)
    for place, layer in enumerate(completion.premature_layers, len(PROMPT) - 1):
        torch.testing.assert_close(scores[place], alone[layer][place], atol=1e-4, rtol=1e-4)


def test_drafted_tokens_tell_the_layer_of_their_check(engine):
    params, target = SamplingParams(max_new_tokens=20), DoLa((0, 2, 4))
    drafted, plain = engine.generate([PROMPT] * 2, params, [SelfSpeculative(2, 3, target), target])
    assert drafted.outputs[0].premature_layers == plain.outputs[0].premature_layers
    assert len(plain.outputs[0].premature_layers) == 20
