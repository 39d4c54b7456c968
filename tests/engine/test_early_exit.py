"""A token leaves at the first exit that is sure of it; the cache is that of full depth."""

import random
from dataclasses import replace

import pytest
import torch

from multiexit_engine import (
    EarlyExit,
    Engine,
    Exit,
    Original,
    SamplingParams,
)

SAMPLINGS = {
    "greedy": SamplingParams(max_new_tokens=40),
    "sampled": SamplingParams(max_new_tokens=40, temperature=0.8, top_k=0, seed=3),
    "warped": SamplingParams(max_new_tokens=40, temperature=1.2, top_k=20, top_p=0.9, seed=4),
    "penalised": SamplingParams(
        max_new_tokens=40, repetition_penalty=1.4, no_repeat_ngram_size=2, logprobs=2
    ),
    "several": SamplingParams(max_new_tokens=25, temperature=1.0, n=3, seed=5),
}
# thresholds that about half of the fixture's rows pass
MODES = [
    EarlyExit(0.3),
    EarlyExit(0.1, "margin"),
    EarlyExit(2.5, "entropy"),
    EarlyExit(0.85, "similarity"),
    EarlyExit(2, "patience"),
    EarlyExit(0.3, shortlist=100),
    EarlyExit(2.5, "entropy", shortlist=50),
    EarlyExit(0.1, "margin", layers=(4,), shortlist=200),
    EarlyExit(0.25, min_layer=3),
]
NEVER = [
    EarlyExit(1.1),
    EarlyExit(1.1, "margin", shortlist=40),
    EarlyExit(-1, "entropy"),
    EarlyExit(1.1, "similarity"),
    EarlyExit(4, "patience"),
]


def prompts(count, longest=60):
    draw = random.Random(count)
    return [[draw.randrange(256) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def tokens(outputs):
    return [completion.token_ids for output in outputs for completion in output.outputs]


def exit_layers(outputs):
    return [completion.exit_layers for output in outputs for completion in output.outputs]


def measure(logits, mode):
    best, second = logits.softmax(-1).topk(2).values.tolist()
    entropy = float(torch.distributions.Categorical(logits=logits).entropy())
    return {"max_prob": best, "margin": best - second, "entropy": entropy}[mode.measure]


@pytest.mark.parametrize("mode", NEVER, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_threshold_that_nothing_passes_gives_the_models_own_tokens(engine, mode, sampling):
    outputs = engine.generate(prompts(6), sampling, mode)
    assert tokens(outputs) == tokens(engine.generate(prompts(6), sampling, Original()))
    assert {layer for layers in exit_layers(outputs) for layer in layers} == {6}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("mode", [EarlyExit(0), EarlyExit(-1, "similarity")], ids=str)
@pytest.mark.parametrize("layer", [2, 4])
def test_a_threshold_that_all_pass_gives_the_tokens_of_the_first_exit(
    engine, layer, mode, sampling
):
    mode = replace(mode, min_layer=layer)
    outputs = engine.generate(prompts(6), sampling, mode)
    assert tokens(outputs) == tokens(engine.generate(prompts(6), sampling, Exit(layer)))
    assert {k for layers in exit_layers(outputs) for k in layers} == {layer}


@pytest.mark.parametrize("mode", [m for m in MODES if m.shortlist is None][:3], ids=str)
def test_each_token_is_that_of_the_first_exit_that_passes(engine, mode):
    sampling = SamplingParams(max_new_tokens=30, ignore_eos=True)
    outputs = engine.generate(prompts(5), sampling, mode)
    seen = set()
    for prompt, output in zip(prompts(5), outputs, strict=True):
        (completion,) = output.outputs
        text = prompt + completion.token_ids
        logits = {k: engine.logits(text, Exit(k)) for k in (2, 4)} | {6: engine.logits(text)}
        for place, token in enumerate(completion.token_ids, len(prompt)):
            values = {k: measure(logits[k][place - 1], mode) for k in (2, 4)}
            is_entropy = mode.measure == "entropy"
            sure = [
                k
                for k, v in values.items()
                if (v <= mode.threshold) is is_entropy or v == mode.threshold
            ]
            layer = min(sure, default=6)
            found = place - len(prompt)
            assert completion.exit_layers[found] == layer
            assert completion.confidences[found] == pytest.approx(values[min(layer, 4)], abs=1e-4)
            assert token == int(logits[layer][place - 1].argmax())
            seen.add(layer)
    assert seen == {2, 4, 6}


def test_patience_counts_exits_that_agree(engine):
    sampling = SamplingParams(max_new_tokens=40, ignore_eos=True)
    (output,) = engine.generate([3, 1, 4], sampling, EarlyExit(2, "patience"))
    (completion,) = output.outputs
    text = [3, 1, 4, *completion.token_ids]
    best = {k: engine.logits(text, Exit(k)).argmax(-1).tolist()[2:-1] for k in (2, 4)}
    expected = [4 if low == high else 6 for low, high in zip(*best.values(), strict=True)]
    assert completion.exit_layers == expected
    assert set(expected) == {4, 6}


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
def test_a_shortlist_with_every_best_token_changes_nothing(engine, measure):
    threshold = {"max_prob": 0.3, "margin": 0.1, "entropy": 2.5}[measure]
    sampling = SamplingParams(max_new_tokens=40)
    plain = engine.generate(prompts(6), sampling, EarlyExit(threshold, measure))
    listed = engine.generate(prompts(6), sampling, EarlyExit(threshold, measure, shortlist=257))
    assert tokens(listed) == tokens(plain)
    assert exit_layers(listed) == exit_layers(plain)


def test_a_row_that_a_shortlist_lets_pass_is_checked_on_all_tokens(engine):
    """Two tokens alone are always sure of themselves; the whole vocabulary is not."""
    mode = EarlyExit(0.3)
    sampling = SamplingParams(max_new_tokens=30, ignore_eos=True)
    outputs = engine.generate(prompts(6), sampling, replace(mode, shortlist=2))
    for output in outputs:
        for layer, value in zip(
            output.outputs[0].exit_layers, output.outputs[0].confidences, strict=True
        ):
            assert layer == 6 or value >= 0.3


@pytest.mark.parametrize("company", [[], [Original()], [EarlyExit(0.3), Exit(4)]], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_cache_is_that_of_full_depth(folder, mode, company):
    engine = Engine.from_pretrained(folder, dtype="float32", block_size=8, prefix_caching=False)
    sampling = SamplingParams(max_new_tokens=60, ignore_eos=True)
    engine.add_request([3, 1, 4], sampling, mode)
    (request,) = engine._core.requests.values()
    for other in company:
        engine.add_request([2, 7], replace(sampling, max_new_tokens=90), other)
    while len(request.sequences[0].token_ids) < 60:
        engine.step()
    (sequence,) = request.sequences
    other = Engine.from_pretrained(folder, dtype="float32", block_size=8, prefix_caching=False)
    other.add_request(sequence.token_ids, SamplingParams(max_new_tokens=9), Original())
    other.step()
    (full,) = next(iter(other._core.requests.values())).sequences
    assert len(set(sequence.exit_layers)) > 1
    depths = [6] * sequence.num_computed_tokens
    for entry in sequence.waiting:
        depths[entry.start :] = [entry.layer] * (len(depths) - entry.start)
    for layer in range(6):
        count = sum(depth > layer for depth in depths)
        found, wanted = (
            _cached(e, s, layer)[:count] for e, s in ((engine, sequence), (other, full))
        )
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert depths == sorted(depths, reverse=True)


def _cached(engine, sequence, layer):
    cache = engine._core.runner.kv_cache
    keys, values = (part[sequence.block_table] for part in (cache.key(layer), cache.value(layer)))
    return torch.cat((keys.flatten(0, 1), values.flatten(0, 1)), -1)


@pytest.mark.parametrize("limits", [{"num": 9, "max_batch_size": 3}, {"num": 30}], ids=str)
@pytest.mark.parametrize("mode", MODES[:4], ids=str)
def test_the_pool_may_be_so_small_that_sequences_are_preempted(folder, limits, mode):
    limits = dict(limits)
    block = 6 * 2 * 8 * 64 * 4
    given, sampling = prompts(8, 20), SamplingParams(max_new_tokens=40)
    big, small = (
        Engine.from_pretrained(
            folder, dtype="float32", block_size=8, max_num_batched_tokens=16, **options
        )
        for options in ({}, {"kv_cache_memory": limits.pop("num") * block, **limits})
    )
    outputs = small.generate(given, sampling, mode)
    expected = big.generate(given, sampling, mode)
    assert (tokens(outputs), exit_layers(outputs)) == (tokens(expected), exit_layers(expected))
    assert small.stats().num_preemptions
    assert small.stats().num_free_kv_blocks == small.stats().num_kv_blocks


def test_prefixes_of_early_requests_serve_others(engine):
    prompt = list(range(100))
    first_of_all = SamplingParams(max_new_tokens=80, ignore_eos=True)
    (first,) = engine.generate(prompt, first_of_all, EarlyExit(0.3))
    longer = prompt + first.outputs[0].token_ids
    (cached,) = engine.generate(longer, SamplingParams(max_new_tokens=40))
    assert cached.num_cached_tokens > 110
    fresh = Engine.from_pretrained(engine.checkpoint.folder, dtype="float32", prefix_caching=False)
    assert tokens(fresh.generate(longer, SamplingParams(max_new_tokens=40))) == tokens([cached])


def test_scores_are_those_of_each_tokens_exit(engine):
    text = prompts(1, 60)[0] + list(range(40))
    mode = EarlyExit(0.3)
    scored = engine.score(text, mode)[0].token_logprobs[1:]
    rows = {k: engine.logits(text, Exit(k)).log_softmax(-1) for k in (2, 4)}
    rows[6] = engine.logits(text).log_softmax(-1)
    layers = [
        min((k for k in (2, 4) if float(rows[k][place].exp().max()) >= 0.3), default=6)
        for place in range(len(text) - 1)
    ]
    expected = [float(rows[k][i, text[i + 1]]) for i, k in enumerate(layers)]
    assert scored == pytest.approx(expected, abs=1e-4)
    assert set(layers) == {2, 4, 6}
    found = engine.logits(text, mode).log_softmax(-1)[: len(layers)]
    wanted = torch.stack([rows[k][i] for i, k in enumerate(layers)])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_prompt_logprobs_come_in_the_order_of_the_prompt(engine):
    text = list(range(80))
    sampling = SamplingParams(max_new_tokens=2, prompt_logprobs=0)
    (output,) = engine.generate(text, sampling, EarlyExit(0.3))
    found = [next(iter(item.values())).logprob for item in output.prompt_logprobs[1:]]
    assert [next(iter(item)) for item in output.prompt_logprobs[1:]] == text[1:]
    assert found == pytest.approx(engine.score(text, EarlyExit(0.3))[0].token_logprobs[1:])


def test_the_engine_counts_the_tokens_of_each_layer(engine):
    before = engine.stats().num_tokens_by_layer
    outputs = engine.generate(prompts(5), SamplingParams(max_new_tokens=20), EarlyExit(0.3))
    after = engine.stats().num_tokens_by_layer
    layers = [layer for layers in exit_layers(outputs) for layer in layers]
    gained = {k: after[k] - before.get(k, 0) for k in after if after[k] != before.get(k, 0)}
    assert gained == {k: layers.count(k) for k in sorted(set(layers))}


def test_layers_above_the_exit_are_not_run_while_nobody_needs_them(engine, monkeypatch):
    model, ran = engine._core.runner.model, []
    run_layers = type(model).run_layers

    def counted(self, hidden, start, stop, *rest):
        ran.append((hidden.shape[0], stop))
        return run_layers(self, hidden, start, stop, *rest)

    monkeypatch.setattr(type(model), "run_layers", counted)
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    engine.generate(prompts(3), sampling, EarlyExit(0))
    assert [stop for _, stop in ran if stop > 2] == [4, 6]  # the prompts
    assert len(ran) == 3 + 19


def test_rows_go_on_with_others_that_need_the_layers_above(engine, monkeypatch):
    model, ran = engine._core.runner.model, []
    run_layers = type(model).run_layers

    def counted(self, hidden, start, stop, *rest):
        ran.append((hidden.shape[0], start))
        return run_layers(self, hidden, start, stop, *rest)

    monkeypatch.setattr(type(model), "run_layers", counted)
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    modes = [EarlyExit(0.0), EarlyExit(0.0), Original()]
    outputs = engine.generate(prompts(3), sampling, modes)
    assert exit_layers(outputs) == [[2] * 20, [2] * 20, [6] * 20]
    assert ran[-3 * 19 :] == [(3, 0), (3, 2), (3, 4)] * 19


def test_rows_that_went_on_leave_when_nobody_else_is_left(engine, monkeypatch):
    model, ran = engine._core.runner.model, []
    run_layers = type(model).run_layers

    def counted(self, hidden, start, stop, *rest):
        ran.append((hidden.shape[0], stop))
        return run_layers(self, hidden, start, stop, *rest)

    monkeypatch.setattr(type(model), "run_layers", counted)
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    modes = [EarlyExit(0.0), EarlyExit(0.0, min_layer=4)]
    outputs = engine.generate(prompts(2), sampling, modes)
    assert exit_layers(outputs) == [[2] * 20, [4] * 20]
    # the first decoded rows go on to 4; there they wait, so those after them leave at 2
    assert ran[-2 * 19 :] == [(2, 2), (2, 4)] + [(2, 2), (1, 4)] * 18


def test_streamed_pieces_add_up(engine):
    sampling, mode = SamplingParams(max_new_tokens=40), EarlyExit(0.3)
    pieces = list(engine.stream("ab", sampling, mode))
    whole = engine.generate("ab", sampling, mode)[0].outputs[0]
    assert [t for piece in pieces for t in piece.token_ids] == whole.token_ids
    assert [k for piece in pieces for k in piece.exit_layers] == whole.exit_layers
    assert [c for piece in pieces for c in piece.confidences] == whole.confidences
    assert len(whole.confidences) == 40
    unwanted = SamplingParams(max_new_tokens=40, confidences=False)
    (unasked,) = engine.generate("ab", unwanted, mode)[0].outputs
    assert (unasked.token_ids, unasked.confidences) == (whole.token_ids, [])


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (EarlyExit(0.5, layers=(3,)), "EarlyExit.layers=3: .*exits at layers 2, 4, 6"),
        (EarlyExit(0.5, layers=(2, 6)), "name exits below layer 6"),
        (EarlyExit(0.5, min_layer=5), "leave no exit below the last layer, 6; .*: 2, 4, 6"),
        (EarlyExit(0.5, shortlist=300), "shortlist=300: the vocabulary has 257 tokens"),
    ],
)
def test_an_exit_that_the_model_lacks_is_refused(engine, mode, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([1, 2], decoding=mode)


def test_beam_search_is_refused_with_what_to_do(engine):
    with pytest.raises(ValueError, match=r"num_beams=2: .*use decoding=Original\(\) or Exit"):
        engine.generate([1], SamplingParams(num_beams=2), EarlyExit(0.5))


def test_rows_that_left_at_different_exits_read_a_shared_head_once(folder, monkeypatch):
    from multiexit_engine.decoding import exits

    engine = Engine.from_pretrained(
        folder, dtype="float32", vocab_projection_mode="SHARED_PROJECTION_DIRECT"
    )
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
    modes = [Exit(2), Exit(4), EarlyExit(0.0, "similarity"), Original()]
    alone = [engine.generate(p, sampling, m)[0] for p, m in zip(prompts(4), modes, strict=True)]
    read, choose = [], exits._chosen_together
    monkeypatch.setattr(
        exits,
        "_chosen_together",
        lambda shared, *rest: (
            read.append(sum(len(own.hidden) for _, own in shared)) or choose(shared, *rest)
        ),
    )
    together = engine.generate(prompts(4), sampling, modes)
    assert tokens(together) == tokens(alone)
    assert read == [4] * 12
