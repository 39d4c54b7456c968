import pytest
import torch

from multiexit_engine import Contrast, Engine, Exit, FinishReason, Original, SamplingParams

MODES = [Original(), Exit(2), Exit(6), Contrast(6, 2), Contrast("original", 4, alpha=0.3)]


def linear(upper, lower):
    return 1.5 * upper - 0.5 * lower


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_greedy_tokens_are_the_best_of_the_modes_own_scores(engine, mode):
    prompt = [3, 1, 4, 1, 5]
    (output,) = engine.generate(prompt, SamplingParams(max_new_tokens=6), mode)
    ids = output.outputs[0].token_ids
    scores = engine.logits(prompt + ids[:-1], mode)
    assert scores[len(prompt) - 1 :].argmax(-1).tolist() == ids


def test_a_custom_contrast_function_replaces_the_formula(engine):
    mode = Contrast(6, 2, function=linear)
    expected = linear(engine.logits([1, 2, 3], Exit(6)), engine.logits([1, 2, 3], Exit(2)))
    torch.testing.assert_close(engine.logits([1, 2, 3], mode), expected)


def test_exit_layers_name_the_head_that_chose(engine):
    outputs = engine.generate([[1, 2]] * 3, SamplingParams(max_new_tokens=2), MODES[1:4])
    assert [o.outputs[0].exit_layers for o in outputs] == [[2, 2], [6, 6], [6, 6]]


def test_text_prompts_give_text(engine):
    (output,) = engine.generate("Once upon", SamplingParams(max_new_tokens=5))
    ids = output.outputs[0].token_ids
    assert output.prompt == "Once upon"
    assert output.outputs[0].text == engine.tokenizer.decode(ids, skip_special_tokens=True)


def test_generation_ends_at_the_end_of_text_and_the_text_leaves_it_out(engine):
    eos = engine.generate([7, 8, 9], SamplingParams(max_new_tokens=4))[0].outputs[0].token_ids[2]
    params = SamplingParams(max_new_tokens=9, stop_token_ids=(eos,))
    completion = engine.generate([7, 8, 9], params)[0].outputs[0]
    assert completion.token_ids[-1] == eos
    assert completion.finish_reason is FinishReason.STOP and completion.stop_reason == eos
    assert completion.text == engine.tokenizer.decode(completion.token_ids[:-1])


def test_least_length_forbids_the_ending_token(engine):
    first = engine.generate([7, 8, 9], SamplingParams(max_new_tokens=1))[0].outputs[0].token_ids[0]
    params = SamplingParams(max_new_tokens=4, min_new_tokens=3, stop_token_ids=(first,))
    ids = engine.generate([7, 8, 9], params)[0].outputs[0].token_ids
    assert len(ids) >= 3 and first not in ids[:3]


def test_a_sequence_that_fills_the_model_ends_by_length(folder):
    engine = Engine.from_pretrained(folder, dtype="float32", max_model_len=20)
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    completion = engine.generate([1] * 15, params)[0].outputs[0]
    assert len(completion.token_ids) == 5
    assert completion.finish_reason is FinishReason.LENGTH


def test_n_gives_different_continuations_of_one_prompt(engine):
    params = SamplingParams(max_new_tokens=8, temperature=5.0, top_k=0, n=4, seed=1)
    outputs = engine.generate("abc", params)[0].outputs
    assert [o.index for o in outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in outputs}) == 4


def test_the_first_of_n_is_what_n_of_one_gives(engine):
    def run(n):
        params = SamplingParams(max_new_tokens=8, temperature=3.0, n=n, seed=5)
        return engine.generate("abc", params)[0].outputs[0].token_ids

    assert run(1) == run(3)


def test_logprobs_hold_the_chosen_token_and_the_best(engine):
    params = SamplingParams(max_new_tokens=3, temperature=3.0, seed=2, logprobs=4)
    completion = engine.generate([5, 6, 7], params, Contrast(6, 2))[0].outputs[0]
    scores = engine.logits([5, 6, 7, *completion.token_ids[:-1]], Contrast(6, 2))[2:]
    for token, found, row in zip(completion.token_ids, completion.logprobs, scores, strict=True):
        best = row.topk(4)
        assert list(found)[:4] == best.indices.tolist()
        assert found[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert found[token].rank == 1 + int((row > row[token]).sum())
    total = sum(
        f[t].logprob for t, f in zip(completion.token_ids, completion.logprobs, strict=True)
    )
    assert completion.cumulative_logprob == pytest.approx(total, abs=1e-4)


def test_all_logprobs_form_a_distribution(engine):
    params = SamplingParams(max_new_tokens=1, logprobs=-1)
    (found,) = engine.generate([5, 6, 7], params, Exit(4))[0].outputs[0].logprobs
    assert len(found) == 257
    assert torch.tensor([x.logprob for x in found.values()]).logsumexp(0).item() == pytest.approx(
        0, abs=1e-5
    )


def test_prompt_logprobs_equal_the_scores_of_the_prompt(engine):
    prompt = list(range(40, 60))
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=0)
    (output,) = engine.generate([prompt], params, Exit(4))
    (score,) = engine.score([prompt], Exit(4))
    assert output.prompt_logprobs[0] is None
    found = [p[t].logprob for t, p in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
    assert found == pytest.approx(score.token_logprobs[1:], abs=1e-5)


def test_one_prompt_may_stand_alone_or_in_a_list(engine):
    params = SamplingParams(max_new_tokens=3)
    alone = engine.generate([1, 2, 3], params)
    listed = engine.generate([[1, 2, 3], [1, 2, 3]], params)
    assert len(alone) == 1 and len(listed) == 2
    assert alone[0].outputs[0].token_ids == listed[1].outputs[0].token_ids


def test_stats_count_tokens_and_prefix_hits(folder):
    engine = Engine.from_pretrained(folder, dtype="float32")
    prompt = list(range(50))
    engine.generate(prompt, SamplingParams(max_new_tokens=4, ignore_eos=True))
    (again,) = engine.generate(prompt, SamplingParams(max_new_tokens=4, ignore_eos=True))
    stats = engine.stats()
    assert stats.num_generated_tokens == 8
    assert again.num_cached_tokens == 48 and stats.prefix_hit_tokens == 48


def test_prefixes_computed_by_a_shallow_mode_do_not_serve_a_deeper_one(folder):
    engine = Engine.from_pretrained(folder, dtype="float32")
    prompt = list(range(50))
    params = SamplingParams(max_new_tokens=6)
    fresh = engine.generate(prompt, params, Original())[0].outputs[0].token_ids
    engine = Engine.from_pretrained(folder, dtype="float32")
    engine.generate(prompt, params, Exit(2))
    (deep,) = engine.generate(prompt, params, Original())
    (shallow,) = engine.generate(prompt, params, Exit(4))
    assert deep.num_cached_tokens == 0 and deep.outputs[0].token_ids == fresh
    assert shallow.num_cached_tokens == 48


def test_a_banned_newline_bans_newlines_and_not_spaces(engine):
    (newline,), (space,) = (engine.tokenizer(text)["input_ids"] for text in ("\n", " "))
    wanted = {newline: 200.0, space: 100.0}
    params = SamplingParams(max_new_tokens=3, logit_bias=wanted, bad_words=["\n"])
    assert engine.generate([1, 2], params)[0].outputs[0].token_ids == [space] * 3
