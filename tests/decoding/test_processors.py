import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from multiexit_engine.decoding.processors import TokenRow, process_scores
from multiexit_engine.params import SamplingParams

VOCAB = 13
TOKENS = st.integers(0, VOCAB - 1)


def row(params, prompt=(1, 2), output=(), eos=(), bad_words=()):
    return TokenRow(params, list(prompt), list(output), 0, tuple(eos), tuple(bad_words))


def random_scores(rows, seed=0):
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def by_transformers(scores, row):
    params = row.params
    processors = LogitsProcessorList()
    if params.logit_bias:
        bias = {(token,): float(value) for token, value in params.logit_bias.items()}
        processors.append(SequenceBiasLogitsProcessor(bias))
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    if row.bad_words:
        words = [list(word) for word in row.bad_words]
        processors.append(NoBadWordsLogitsProcessor(words, list(row.eos_token_ids)))
    if params.min_new_tokens and row.eos_token_ids:
        processors.append(
            MinNewTokensLengthLogitsProcessor(
                len(row.prompt_token_ids), params.min_new_tokens, list(row.eos_token_ids)
            )
        )
    context = torch.tensor([row.prompt_token_ids + row.output_token_ids])
    return processors(context, scores[None])[0]


@st.composite
def token_rows(draw):
    params = SamplingParams(
        logit_bias=draw(st.dictionaries(TOKENS, st.floats(-5, 5, width=32), max_size=3)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8, 2.0])),
        no_repeat_ngram_size=draw(st.integers(0, 4)),
        min_new_tokens=draw(st.integers(0, 6)),
    )
    small = st.integers(0, 3)  # few tokens, so that n-grams do repeat
    words = st.lists(small, min_size=1, max_size=3).map(tuple)
    return row(
        params,
        prompt=draw(st.lists(small, min_size=1, max_size=8)),
        output=draw(st.lists(small, max_size=8)),
        eos=draw(st.lists(TOKENS, max_size=2, unique=True)),
        bad_words=draw(st.lists(words, max_size=3, unique=True)),
    )


@settings(deadline=None, max_examples=300)
@given(st.lists(token_rows(), min_size=1, max_size=4))
def test_equals_transformers_processors(rows):
    scores = random_scores(len(rows))
    expected = torch.stack([by_transformers(s, r) for s, r in zip(scores, rows, strict=True)])
    assert torch.equal(process_scores(scores, rows), expected)


def test_rows_that_ask_for_nothing_are_handed_through():
    scores = random_scores(2)
    assert process_scores(scores, [row(SamplingParams()), row(SamplingParams())]) is scores


def test_scores_are_left_alone():
    scores = random_scores(1)
    before = scores.clone()
    process_scores(scores, [row(SamplingParams(repetition_penalty=2.0))])
    assert torch.equal(scores, before)


def test_presence_and_frequency_count_the_output_only():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    scores = random_scores(1)
    expected = scores.clone()
    expected[0, 4] -= 0.5 + 0.25 * 3
    expected[0, 6] -= 0.5 + 0.25
    actual = process_scores(scores, [row(params, prompt=[1, 4, 4], output=[4, 6, 4, 4])])
    torch.testing.assert_close(actual, expected)


def test_repetition_comes_before_presence_and_after_the_bias():
    params = SamplingParams(logit_bias={4: 1.0}, repetition_penalty=2.0, presence_penalty=0.5)
    actual = process_scores(torch.ones(1, VOCAB), [row(params, output=[4])])
    assert actual[0, 4] == (1.0 + 1.0) / 2.0 - 0.5


@pytest.mark.parametrize(("output", "expected"), [((), -math.inf), ((3, 3), 0.0)])
def test_ending_tokens_wait_for_the_least_number_of_tokens(output, expected):
    item = row(SamplingParams(min_new_tokens=2), output=output, eos=[5, 7])
    actual = process_scores(torch.zeros(1, VOCAB), [item])
    assert actual[0, [5, 7]].tolist() == [expected] * 2


def test_a_row_does_not_depend_on_the_others():
    params = [
        SamplingParams(repetition_penalty=1.5),
        SamplingParams(),
        SamplingParams(no_repeat_ngram_size=2, logit_bias={3: 2.0}),
        SamplingParams(presence_penalty=1.0, frequency_penalty=-0.5),
    ]
    rows = [row(p, prompt=[1, 2, 1], output=[4, 1]) for p in params]
    scores = random_scores(4)
    together = process_scores(scores, rows)
    for index, item in enumerate(rows):
        alone = process_scores(scores[index : index + 1], [item])
        assert torch.equal(together[index : index + 1], alone)


def test_a_forced_token_is_all_that_is_left_of_its_row():
    free = row(SamplingParams())
    found = process_scores(torch.ones(2, VOCAB), [free, free._replace(forced_token_id=2)])
    assert found[0].tolist() == [1.0] * VOCAB
    assert found[1].tolist() == [-math.inf, -math.inf, 0.0, *[-math.inf] * (VOCAB - 3)]
