"""Self-speculation gives the target's own tokens, with whatever drafts, in whatever company."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare

from multiexit_engine import (
    Contrast,
    DoLa,
    Engine,
    Exit,
    Original,
    SamplingParams,
    SelfSpeculative,
)
from multiexit_engine.errors import RequestFailed
from tests.tiny import save_gpt2

TARGETS = [
    Original(),
    Exit(4),
    Contrast(6, 2),
    Contrast("original", 4, alpha=0.01),
    DoLa((0, 2, 4)),
]
SAMPLINGS = {
    "greedy": SamplingParams(max_new_tokens=40),
    "sampled": SamplingParams(max_new_tokens=40, temperature=0.8, top_k=0, seed=3),
    "warped": SamplingParams(max_new_tokens=40, temperature=1.2, top_k=20, top_p=0.9, seed=4),
    "penalised": SamplingParams(
        max_new_tokens=40, repetition_penalty=1.4, no_repeat_ngram_size=2, logprobs=2
    ),
    "several": SamplingParams(max_new_tokens=25, temperature=1.0, n=3, seed=5),
}


def prompts(count, longest=60):
    draw = random.Random(count)
    return [[draw.randrange(256) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def tokens(outputs):
    return [completion.token_ids for output in outputs for completion in output.outputs]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_tokens_are_those_of_the_target_alone(engine, target, sampling):
    given = prompts(6)
    expected = engine.generate(given, sampling, target)
    for draft_len in (1, 4, "auto"):
        outputs = engine.generate(given, sampling, SelfSpeculative(2, draft_len, target))
        assert tokens(outputs) == tokens(expected)
        assert [[c.text for c in o.outputs] for o in outputs] == [
            [c.text for c in o.outputs] for o in expected
        ]


def test_a_shallower_target_may_have_more_drafts_than_a_deeper_one(engine):
    """Steps stand in order of depth, rounds of drafts in order of length."""
    given, targets = prompts(2), [Original(), Exit(4)]
    sampling = SamplingParams(max_new_tokens=20)
    expected = engine.generate(given, sampling, targets)
    modes = [SelfSpeculative(2, 1, targets[0]), SelfSpeculative(2, 3, targets[1])]
    assert tokens(engine.generate(given, sampling, modes)) == tokens(expected)


@pytest.mark.parametrize("tree", [False, (3, 3)])
def test_a_request_that_runs_out_of_tokens_keeps_those_before(engine, tree):
    sampling = SamplingParams(structured_outputs={"regex": "a{5}c"}, bad_words=["c"])
    plain, drafted = (
        engine.generate([5, 6, 7], sampling, mode)[0]
        for mode in (Original(), SelfSpeculative(4, 4, tree=tree))
    )
    assert plain.error == drafted.error is not None
    assert drafted.outputs[0].token_ids == plain.outputs[0].token_ids
    assert len(drafted.outputs[0].token_ids) == 5


def test_logprobs_are_those_of_the_target(engine):
    sampling = SamplingParams(max_new_tokens=20, logprobs=2)
    plain, drafted = (
        engine.generate([5, 6, 7], sampling, mode)[0].outputs[0]
        for mode in (Contrast(6, 2), SelfSpeculative(4, 3, Contrast(6, 2)))
    )
    for one, other in zip(plain.logprobs, drafted.logprobs, strict=True):
        assert list(one) == list(other)
        for token in one:
            assert one[token].logprob == pytest.approx(other[token].logprob, abs=1e-4)


@pytest.mark.parametrize("limits", [{"num": 9, "max_batch_size": 3}, {"num": 30}], ids=str)
def test_the_pool_may_be_so_small_that_sequences_are_preempted(folder, limits):
    num_blocks = limits.pop("num")
    block = 6 * 2 * 8 * 64 * 4
    given, sampling = prompts(8, 20), SamplingParams(max_new_tokens=40)
    small = Engine.from_pretrained(
        folder,
        dtype="float32",
        block_size=8,
        kv_cache_memory=num_blocks * block,
        max_num_batched_tokens=16,
        **limits,
    )
    expected = small.generate(given, sampling, Contrast(6, 2))
    outputs = small.generate(given, sampling, SelfSpeculative(2, 5, Contrast(6, 2)))
    assert tokens(outputs) == tokens(expected)
    assert small.stats().num_preemptions
    assert small.stats().num_free_kv_blocks == small.stats().num_kv_blocks


def test_prefixes_that_a_drafting_request_computed_serve_others(engine):
    prompt, sampling = list(range(100)), SamplingParams(max_new_tokens=60)
    (first,) = engine.generate(prompt, sampling, SelfSpeculative(2, 4))
    longer = prompt + first.outputs[0].token_ids
    (cached,) = engine.generate(longer, sampling)
    assert cached.num_cached_tokens > 140
    fresh = Engine.from_pretrained(engine.checkpoint.folder, dtype="float32", prefix_caching=False)
    assert tokens(fresh.generate(longer, sampling)) == tokens([cached])


def test_sampled_tokens_follow_the_targets_distribution(tmp_path):
    folder = save_gpt2(tmp_path / "few", vocab_size=11, sharpness=2.0)
    engine = Engine.from_pretrained(folder, dtype="float32")
    target = Contrast(6, 2)
    count = 4000
    sampling = [
        SamplingParams(max_new_tokens=3, temperature=1.0, top_k=0, seed=i, ignore_eos=True)
        for i in range(count)
    ]
    outputs = engine.generate([[1, 2]] * count, sampling, SelfSpeculative(4, 2, target))
    seen = Counter(tuple(ids[1:3]) for ids in tokens(outputs) if ids[0] == 3)
    # the second and third token, given the first: the drafted ones
    exact = {}
    second = engine.logits([1, 2, 3], target)[-1].softmax(-1).double()
    for token in range(11):
        third = engine.logits([1, 2, 3, token], target)[-1].softmax(-1).double()
        exact |= {(token, other): float(second[token] * third[other]) for other in range(11)}
    total = sum(seen.values())
    assert total > 50
    common = [pair for pair in exact if exact[pair] * total >= 5]
    rest = total - sum(seen[pair] for pair in common)
    expected = [exact[pair] * total for pair in common]
    observed = [seen[pair] for pair in common]
    if (left := total - sum(expected)) > 1e-6:
        expected.append(left)
        observed.append(rest)
    assert chisquare(observed, expected).pvalue > 1e-4


def test_the_output_tells_which_tokens_were_drafted(engine):
    sampling = SamplingParams(max_new_tokens=30)
    (output,) = engine.generate([1, 2, 3], sampling, SelfSpeculative(4, 3, Exit(6)))
    (completion,) = output.outputs
    assert len(completion.drafted) == len(completion.token_ids) == 30
    assert completion.exit_layers == [6] * 30
    before = engine.stats()
    engine.generate([1, 2, 3], sampling, SelfSpeculative(4, 3, Exit(6)))
    after = engine.stats()
    num_accepted = after.num_accepted_tokens - before.num_accepted_tokens
    assert 0 <= sum(completion.drafted) <= num_accepted
    assert after.num_drafted_tokens - before.num_drafted_tokens >= num_accepted


@pytest.fixture
def agreeing_engine(tmp_path):
    """An engine whose layers above exit 4 add nothing: every draft is right."""
    folder = save_gpt2(tmp_path / "same")
    engine = Engine.from_pretrained(
        folder,
        dtype="float32",
        vocab_projection_mode="SHARED_PROJECTION_DIRECT",
        lm_head_layer_indices=[4, 6],
    )
    for block in engine._model.blocks[4:]:
        for linear in (block.attention.output, block.mlp.down):
            linear.weight.data.zero_()
            linear.bias.data.zero_()
    return engine


def test_an_exit_that_always_agrees_needs_few_steps(agreeing_engine):
    before = agreeing_engine.stats()
    (output,) = agreeing_engine.generate(
        [1, 2], SamplingParams(max_new_tokens=41), SelfSpeculative(4, 4)
    )
    after = agreeing_engine.stats()
    assert after.num_accepted_tokens - before.num_accepted_tokens == 32
    assert after.num_steps - before.num_steps == 9  # the prompt, then five tokens a step
    assert sum(output.outputs[0].drafted) == 32


def test_drafts_come_from_the_draft_vocabulary(agreeing_engine):
    given, sampling = prompts(4), replace(SAMPLINGS["sampled"], temperature=1.5)
    expected = agreeing_engine.generate(given, sampling)
    shares = []
    for draft_vocab in (1, 120, 256, 9999):
        mode = SelfSpeculative(4, 1, draft_vocab=draft_vocab)
        outputs = agreeing_engine.generate(given, sampling, mode)
        assert tokens(outputs) == tokens(expected)
        drafted = [
            token
            for output in outputs
            for token, was_drafted in zip(
                output.outputs[0].token_ids, output.outputs[0].drafted, strict=True
            )
            if was_drafted
        ]
        assert all(token < draft_vocab for token in drafted)
        shares.append(len(drafted))
    assert shares[0] < shares[1] < shares[2] == shares[3]


def test_drafts_stop_where_the_request_ends(engine):
    for count in range(1, 8):
        sampling = SamplingParams(max_new_tokens=count)
        (output,) = engine.generate([9, 8], sampling, SelfSpeculative(2, 16))
        assert len(output.outputs[0].token_ids) == count
    limit = engine.config.max_model_len
    sampling = SamplingParams(max_new_tokens=50, ignore_eos=True)
    (output,) = engine.generate([9] * (limit - 5), sampling, SelfSpeculative(2, 16))
    assert len(output.outputs[0].token_ids) == 5


def test_streamed_pieces_add_up(engine):
    sampling = SamplingParams(max_new_tokens=40)
    pieces = list(engine.stream("ab", sampling, SelfSpeculative(2, 4)))
    whole = engine.generate("ab", sampling)[0].outputs[0]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [t for piece in pieces for t in piece.token_ids] == whole.token_ids


def test_scores_are_those_of_the_target(engine):
    drafted, plain = (
        engine.score([1, 2, 3, 4], mode)[0].total
        for mode in (SelfSpeculative(2, target=Contrast(6, 4)), Contrast(6, 4))
    )
    assert drafted == pytest.approx(plain)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (SelfSpeculative(6), "draft_exit=6: must be below layer 6"),
        (SelfSpeculative(4, target=Exit(4)), "draft_exit=4: must be below layer 4"),
        (SelfSpeculative(3), "exits at layers 2, 4, 6"),
        (SelfSpeculative(2, target=Contrast(6, 3)), "Contrast.lower=3"),
    ],
)
def test_an_exit_that_cannot_draft_is_refused(engine, mode, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([1, 2], decoding=mode)


def test_beam_search_is_refused_with_the_mode_that_has_it(engine):
    with pytest.raises(ValueError, match=r"num_beams=2: .*use decoding=Exit\(layer=6\)"):
        engine.generate([1], SamplingParams(num_beams=2), SelfSpeculative(2, target=Exit(6)))


def test_a_target_function_that_fails_ends_its_request_alone(engine):
    calls = []

    def fails_later(upper, lower):
        calls.append(1)
        return upper - lower if len(calls) < 7 else torch.tensor(0.0)

    mode = SelfSpeculative(2, 2, Contrast(6, 4, function=fails_later))
    modes = [Original(), mode]
    good, bad = engine.generate([[1, 2], [3, 4]], SamplingParams(max_new_tokens=20), modes)
    assert len(good.outputs[0].token_ids) == 20
    assert bad.error is not None and "the contrast function returned" in bad.error
    with pytest.raises(RequestFailed):
        list(engine.stream([3, 4], SamplingParams(max_new_tokens=20), mode))
