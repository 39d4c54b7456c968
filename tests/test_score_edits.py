"""The edits of a text that grows, or is taken back, are those of the same text read afresh."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from multiexit_engine.params import SamplingParams
from multiexit_engine.score_edits import BIAS, LOSS, MORE, PENALTY, TextEdits

TOKENS = st.integers(0, 4)
TEXTS = st.lists(TOKENS, max_size=6)


def as_mapping(edits):
    return dict(zip(edits.tokens.tolist(), map(tuple, edits.numbers.tolist()), strict=True))


@settings(deadline=None, max_examples=200)
@given(
    prompt=st.lists(TOKENS, min_size=1, max_size=4),
    outputs=st.lists(TEXTS, min_size=1, max_size=5),
    banned=st.lists(st.integers(0, 6), max_size=3),
    bias=st.dictionaries(TOKENS, st.sampled_from([1.5, -2.0]), max_size=3),
    penalties=st.tuples(*[st.sampled_from([0.0, 0.3])] * 2),
    repetition=st.sampled_from([1.0, 1.3]),
    ngram=st.sampled_from([0, 1, 2]),
)
def test_edits_do_not_depend_on_the_texts_before(
    prompt, outputs, banned, bias, penalties, repetition, ngram
):
    params = SamplingParams(
        logit_bias=bias,
        presence_penalty=penalties[0],
        frequency_penalty=penalties[1],
        repetition_penalty=repetition,
        no_repeat_ngram_size=ngram,
    )
    grown = TextEdits(params, prompt)
    for output in outputs:
        found = grown.after(output, banned)
        afresh = TextEdits(params, prompt).after(output, banned)
        assert as_mapping(found) == as_mapping(afresh)
        assert len(set(found.tokens.tolist())) == len(found.tokens)


def test_numbers_count_how_often_a_token_came():
    params = SamplingParams(
        repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: 2.0}
    )
    edits = TextEdits(params, [1, 2, 2]).after([2, 7, 7], banned=[9])
    found = {token: dict(zip("bplm", row, strict=True)) for token, row in as_mapping(edits).items()}
    assert (BIAS, PENALTY, LOSS, MORE) == (0, 1, 2, 3)
    assert found == {
        1: {"b": 0, "p": 1.3, "l": 0, "m": 0.75},
        2: {"b": 0, "p": 1.3, "l": 0.75, "m": 0.25},
        7: {"b": 0, "p": 1.3, "l": 1.0, "m": 0.25},
        9: {"b": 2.0, "p": 1.0, "l": np.inf, "m": 0.75},
    }


def test_what_was_given_stays_as_it_was_when_the_text_grows():
    text = TextEdits(SamplingParams(frequency_penalty=1.0), [1])
    before = text.after([3])
    text.after([3, 3])
    assert as_mapping(before) == {3: (0, 1, 1, 1)}


def test_there_is_room_for_any_number_of_tokens():
    bias = {token: float(token) for token in range(100)}
    found = TextEdits(SamplingParams(logit_bias=bias), [1]).after([], banned=range(90, 120))
    told = as_mapping(found)
    assert [told[token][BIAS] for token in range(100)] == [*bias.values()]
    assert [token for token in told if told[token][LOSS] == np.inf] == [*range(90, 120)]
