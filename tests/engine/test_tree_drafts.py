"""Other tokens at the places of drafts: the target's own tokens still, and fewer steps for them."""

import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from multiexit_engine import (
    Contrast,
    DoLa,
    EarlyExit,
    Engine,
    Exit,
    Original,
    SamplingParams,
    SelfSpeculative,
    StructuredOutputs,
)
from tests.engine.company import run_in_random_company
from tests.engine.test_self_speculation import SAMPLINGS, TARGETS, prompts, tokens
from tests.tiny import save_gpt2

TREES = [2, (2, 2), (1, 3), (3, 1, 4)]


@pytest.fixture(scope="module")
def agreeing_folder(tmp_path_factory):
    """A model whose layers above the second change some, so that many guesses are right."""
    folder = save_gpt2(tmp_path_factory.mktemp("agreeing"), exits=())
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if "c_proj" in name and int(name.split(".h.")[1].split(".")[0]) >= 2:
            value *= 0.6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def agreeing_engine(folder, **options):
    return Engine.from_pretrained(
        folder,
        dtype="float32",
        vocab_projection_mode="SHARED_PROJECTION_DIRECT",
        lm_head_layer_indices=[2, 4, 6],
        **options,
    )


@pytest.fixture(scope="module")
def agreeing(agreeing_folder):
    return agreeing_engine(agreeing_folder, block_size=8)


def second_best(upper, lower):
    """A distribution whose best token is the second best of the upper head."""
    best = upper.argmax(-1, keepdim=True)
    return upper.scatter(-1, best, -1e4)


def counts(engine, run):
    """What ``run`` gave, the tokens that were drafted for it and accepted, and its steps."""
    before = engine.stats()
    found = run()
    after = engine.stats()
    return (
        found,
        after.num_drafted_tokens - before.num_drafted_tokens,
        after.num_accepted_tokens - before.num_accepted_tokens,
        after.num_steps - before.num_steps,
    )


@pytest.mark.parametrize("target", [Original(), Contrast(6, 2), DoLa((0, 2, 4))], ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_tokens_and_logprobs_are_those_of_the_target_alone(agreeing, target, sampling):
    given, sampling = prompts(4), replace(sampling, logprobs=2)
    expected = agreeing.generate(given, sampling, target)
    for tree in (2, (3, 1, 4)):
        outputs = agreeing.generate(given, sampling, SelfSpeculative(2, 4, target, tree=tree))
        assert tokens(outputs) == tokens(expected)
        assert [[c.logprobs for c in o.outputs] for o in outputs] == [
            [c.logprobs for c in o.outputs] for o in expected
        ]


@pytest.mark.parametrize("sampling", ["greedy", "warped", "penalised"])
def test_more_of_what_is_checked_is_right(agreeing, sampling):
    given, sampling = prompts(5), SAMPLINGS[sampling]
    modes = [SelfSpeculative(2, 3, tree=tree) for tree in (False, 2, (2, 2, 2), (4, 4, 4))]
    accepted = [
        counts(agreeing, lambda mode=mode: agreeing.generate(given, sampling, mode))[2]
        for mode in modes
    ]
    assert accepted == sorted(set(accepted))


def test_an_exit_whose_second_choice_is_always_right_gives_two_tokens_a_step(tmp_path):
    folder = save_gpt2(tmp_path / "same", exits=())
    engine = agreeing_engine(folder)
    for block in engine._model.blocks[4:]:
        for linear in (block.attention.output, block.mlp.down):
            linear.weight.data.zero_()
            linear.bias.data.zero_()
    target = Contrast("original", 2, function=second_best)
    sampling = SamplingParams(max_new_tokens=41, ignore_eos=True)
    expected = tokens(engine.generate([1, 2], sampling, target))
    for tree, steps in ((False, 41), (2, 21), ((2, 3), 21)):
        mode = SelfSpeculative(4, 2, target, tree=tree)
        output, drafted, accepted, num_steps = counts(
            engine, lambda mode=mode: engine.generate([1, 2], sampling, mode)
        )
        assert tokens(output) == expected
        assert num_steps == steps
        assert accepted == sum(output[0].outputs[0].drafted) == 41 - steps
        assert output[0].outputs[0].drafted == [False] + [tree is not False, False] * 20
        assert drafted >= accepted


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_block_sizes_and_cut_prompts_change_nothing(agreeing_folder, agreeing, block_size):
    other = agreeing_engine(agreeing_folder, block_size=block_size, max_num_batched_tokens=12)
    given, sampling = prompts(4), SamplingParams(max_new_tokens=30)
    for target in (Original(), Contrast(6, 2)):
        expected = agreeing.generate(given, sampling, target)
        mode = SelfSpeculative(2, 3, target, tree=(2, 3))
        assert tokens(other.generate(given, sampling, mode)) == tokens(expected)


def test_plain_pytorch_gives_the_same_tokens(agreeing_folder, agreeing):
    reference = agreeing_engine(agreeing_folder, backend="reference")
    given, sampling = prompts(3), SamplingParams(max_new_tokens=20)
    expected = agreeing.generate(given, sampling)
    mode = SelfSpeculative(2, 3, tree=(2, 2))
    assert tokens(reference.generate(given, sampling, mode)) == tokens(expected)


def test_a_pool_without_room_for_alternatives_gives_the_same_tokens(agreeing_folder, agreeing):
    block = 6 * 2 * 8 * 64 * 4
    small = agreeing_engine(
        agreeing_folder, block_size=8, kv_cache_memory=9 * block, max_num_batched_tokens=16
    )
    given, sampling = prompts(8, 20), SamplingParams(max_new_tokens=40)
    expected = agreeing.generate(given, sampling, Contrast(6, 2))
    mode = SelfSpeculative(2, 5, Contrast(6, 2), tree=(3, 3, 3))
    assert tokens(small.generate(given, sampling, mode)) == tokens(expected)
    assert small.stats().num_preemptions
    assert small.stats().num_free_kv_blocks == small.stats().num_kv_blocks


def test_prefixes_that_a_request_with_a_tree_computed_serve_others(agreeing_folder):
    engine = agreeing_engine(agreeing_folder)
    prompt, sampling = list(range(100)), SamplingParams(max_new_tokens=60, logprobs=1)
    (first,) = engine.generate(prompt, sampling, SelfSpeculative(2, 4, tree=(3, 2)))
    longer = prompt + first.outputs[0].token_ids
    (cached,) = engine.generate(longer, sampling)
    assert cached.num_cached_tokens > 140
    fresh = agreeing_engine(agreeing_folder, prefix_caching=False)
    (expected,) = fresh.generate(longer, sampling)
    assert cached.outputs[0].logprobs == expected.outputs[0].logprobs


def test_random_company_aborts_and_preemptions_change_nothing(agreeing_folder):
    draw = random.Random(7)
    engine = agreeing_engine(
        agreeing_folder, block_size=4, max_batch_size=8, kv_cache_memory=60 * 6 * 2 * 4 * 64 * 4
    )
    modes = [*TARGETS, EarlyExit(0.3), EarlyExit(0.3, kv="copy"), SelfSpeculative(2, 3)]
    modes += [SelfSpeculative(2, k, t, tree=2) for t in TARGETS for k in (1, 3, "auto")]
    modes += [SelfSpeculative(e, 3, tree=tree) for e in (2, 4) for tree in TREES]
    requests = [
        (prompt, replace(draw.choice(list(SAMPLINGS.values())), seed=i), draw.choice(modes))
        for i, prompt in enumerate(prompts(32))
    ]
    alone = [tokens(engine.generate([p], s, m)) for p, s, m in requests]
    found, aborted = run_in_random_company(engine, requests, draw)
    assert found == {i: alone[i] for i in range(32) if i not in aborted}
    stats = engine.stats()
    assert stats.num_preemptions and stats.num_free_kv_blocks == stats.num_kv_blocks


def test_stops_streams_and_lengths_are_those_of_the_target(agreeing):
    prompt, mode = "ab", SelfSpeculative(2, 4, tree=(3, 2))
    (whole,) = agreeing.generate(prompt, SamplingParams(max_new_tokens=40))[0].outputs
    pieces = list(agreeing.stream(prompt, SamplingParams(max_new_tokens=40), mode))
    assert "".join(piece.text for piece in pieces) == whole.text
    for length in range(1, 9):
        sampling = SamplingParams(max_new_tokens=length)
        assert tokens(agreeing.generate(prompt, sampling, mode)) == [whole.token_ids[:length]]
    for place in range(0, 30, 3):
        sampling = SamplingParams(max_new_tokens=40, stop_token_ids=[whole.token_ids[place]])
        assert tokens(agreeing.generate(prompt, sampling, mode)) == tokens(
            agreeing.generate(prompt, sampling)
        )
    limit = agreeing.config.max_model_len
    sampling = SamplingParams(max_new_tokens=50, ignore_eos=True)
    (output,) = agreeing.generate([9] * (limit - 5), sampling, mode)
    assert len(output.outputs[0].token_ids) == 5


def test_texts_of_a_given_form_are_those_of_the_target(agreeing):
    form = StructuredOutputs(regex=r"[a-f]{3,9}-(\d{2}|xyz)\.")
    sampling = SamplingParams(
        max_new_tokens=60, temperature=1.5, top_k=0, seed=1, structured_outputs=form
    )
    for target in (Original(), DoLa((2, 4)), Exit(4)):
        expected = tokens(agreeing.generate([[5, 6, 7], [200]], sampling, target))
        mode = SelfSpeculative(2, 4, target, tree=(3, 3, 3, 3))
        assert tokens(agreeing.generate([[5, 6, 7], [200]], sampling, mode)) == expected


def test_a_target_function_that_fails_ends_its_request_alone(agreeing):
    calls = []

    def fails_later(upper, lower):
        calls.append(1)
        return upper - lower if len(calls) < 20 else torch.tensor(0.0)

    mode = SelfSpeculative(2, 2, Contrast(6, 4, function=fails_later), tree=(2, 2))
    good, bad = agreeing.generate(
        [[1, 2], [3, 4]], SamplingParams(max_new_tokens=20), [SelfSpeculative(2, 3, tree=2), mode]
    )
    assert len(good.outputs[0].token_ids) == 20
    assert bad.error is not None and "the contrast function returned" in bad.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree": 0}, r"tree=0: must be a number of choices, 1..8"),
        ({"tree": 9}, r"tree=9"),
        ({"tree": (2, 0)}, r"tree=\(2, 0\)"),
        ({"tree": "wide"}, r"tree='wide'"),
        ({"tree": (2, 2, 2), "draft_len": 2}, r"must be choices at 2 places at most"),
    ],
)
def test_trees_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelfSpeculative(2, **options)


def test_places_with_one_choice_at_the_end_are_no_part_of_a_tree():
    assert SelfSpeculative(2, tree=(2, 1, 1)) == SelfSpeculative(2, tree=2)
    assert SelfSpeculative(2, tree=True) == SelfSpeculative(2, tree=2)
    assert SelfSpeculative(2, tree=1) == SelfSpeculative(2)
