"""Beam search against transformers' own, over one model recomputed in full at every step."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from multiexit_engine.decoding.beam import BeamSearch, beam_candidates
from multiexit_engine.decoding.processors import TokenRow
from multiexit_engine.params import SamplingParams

VOCAB = 37


@functools.cache
def model(seed):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


def by_transformers(seed, prompt, params, eos):
    ids = torch.tensor([prompt])
    out = model(seed).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=params.num_beams,
        num_return_sequences=params.n,
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens or None,
        length_penalty=float(params.length_penalty),
        early_stopping=params.early_stopping,
        repetition_penalty=float(params.repetition_penalty),
        no_repeat_ngram_size=params.no_repeat_ngram_size,
        eos_token_id=list(eos) or None,
        pad_token_id=VOCAB + 1,
        return_dict_in_generate=True,
        output_scores=True,
        use_cache=False,
    )
    texts = [
        [token for token in row if token != VOCAB + 1]
        for row in out.sequences[:, len(prompt) :].tolist()
    ]
    return texts, out.sequences_scores.tolist()


@torch.no_grad()
def by_us(seed, prompt, params, eos):
    search = BeamSearch(
        params.num_beams,
        params.n,
        params.length_penalty,
        params.early_stopping,
        eos,
        prompt_len=len(prompt),
        max_len=len(prompt) + params.max_new_tokens,
    )
    outputs, running = [[]], [0.0]
    while not search.is_done:
        contexts = torch.tensor([prompt + output for output in outputs])
        scores = model(seed)(contexts).logits[:, -1]
        rows = [TokenRow(params, prompt, output, 0, tuple(eos)) for output in outputs]
        count = min(search.num_candidates, VOCAB)
        values, ids = beam_candidates(scores, rows, running, count)
        step = search.advance(values.tolist(), ids.tolist())
        pairs = zip(step.parents, step.tokens, strict=True)
        outputs = [[*outputs[parent], token] for parent, token in pairs]
        running = step.scores
    results = search.results()
    return [r.token_ids for r in results], [r.score for r in results]


def assert_same(seed, prompt, params, eos):
    texts, scores = by_us(seed, prompt, params, eos)
    expected_texts, expected_scores = by_transformers(seed, prompt, params, eos)
    assert texts == expected_texts
    assert scores == pytest.approx(expected_scores, abs=1e-5, rel=1e-6)


PENALTIES = st.sampled_from([1.0, 0.0, 0.6, 2.0, -1.0])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    seed=st.integers(0, 5),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
    num_beams=st.integers(2, 6),
    returned=st.integers(1, 6),
    max_new_tokens=st.integers(1, 12),
    min_new_tokens=st.integers(0, 5),
    length_penalty=PENALTIES,
    early_stopping=st.sampled_from([False, True, "never"]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.4]),
    no_repeat_ngram_size=st.sampled_from([0, 0, 2]),
    eos=st.lists(st.integers(0, VOCAB - 1), max_size=4, unique=True),
)
def test_equals_transformers(seed, prompt, num_beams, returned, min_new_tokens, eos, **values):
    params = SamplingParams(
        num_beams=num_beams,
        n=min(returned, num_beams),
        min_new_tokens=min(min_new_tokens, values["max_new_tokens"]),
        **values,
    )
    assert_same(seed, prompt, params, eos)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 1.7, -0.5])
def test_long_searches_with_common_endings(early_stopping, length_penalty):
    params = SamplingParams(
        num_beams=4,
        n=4,
        max_new_tokens=25,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    for seed in range(4):
        assert_same(seed, [1, 2, 3], params, eos=(4, 9, 16, 25, 36))


def search(num_beams=2, num_return=2, max_len=5, **changes):
    values = {
        "length_penalty": 1.0,
        "early_stopping": False,
        "eos_token_ids": (0,),
        "prompt_len": 1,
    }
    return BeamSearch(num_beams, num_return, max_len=max_len, **{**values, **changes})


def test_number_of_candidates():
    assert search(3, eos_token_ids=()).num_candidates == 6
    assert search(3, eos_token_ids=(1,)).num_candidates == 6
    assert search(3, eos_token_ids=(1, 2)).num_candidates == 9


def test_beams_that_go_on():
    beams = search()
    step = beams.advance([[-0.5, -1.0, -2.0, -3.0]], [[5, 0, 7, 8]])
    assert (step.parents, step.tokens, step.scores) == ([0, 0], [5, 7], [-0.5, -2.0])
    step = beams.advance([[-1.0, -9.0], [-2.25, -2.5]], [[1, 2], [3, 4]])
    assert (step.parents, step.tokens, step.scores) == ([0, 1], [1, 3], [-1.0, -2.25])
    assert not beams.is_done


def test_the_longest_sequences_finish():
    beams = search(max_len=2)
    beams.advance([[-0.5, -1.0, -2.0, -3.0]], [[5, 6, 7, 8]])
    assert beams.is_done
    assert [(r.token_ids, r.score) for r in beams.results()] == [([5], -0.5), ([6], -1.0)]


def test_early_stopping_ends_at_enough_finished_sequences():
    beams = search(early_stopping=True, eos_token_ids=(0, 1))
    beams.advance([[-0.5, -1.0, -2.0, -3.0, -4.0, -5.0]], [[0, 1, 7, 8, 9, 10]])
    assert beams.is_done
    assert [r.token_ids for r in beams.results()] == [[0], [1]]


def test_fewer_continuations_than_beams():
    """Masks may leave a prompt with one token: the hopeless copies fill the other beams."""
    beams = search(num_beams=3)
    infinity = float("inf")
    step = beams.advance([[-0.5, -infinity, -infinity]], [[5, 6, 7]])
    assert step.parents == [0, 0, 0] and step.tokens == [5, 5, 5]
    assert step.scores == [-0.5, -1e9, -1e9]
