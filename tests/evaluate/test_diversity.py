"""Repetition and diversity, by hand and against simctg's loop."""

import random

import pytest

from multiexit_engine.evaluate.diversity import measure_diversity


def simctg(text):
    """``measure_repetition_and_diversity([text])`` of simctg 0.7, as its loops run."""
    tokens, repetition, diversity = text.split(), {}, 1.0
    for size in (2, 3, 4):
        ngrams, start, end = [], 0, size
        while end < len(tokens):
            ngrams.append(tuple(tokens[start:end]))
            start, end = start + 1, end + 1
        repetition[size] = round(100 * (1 - len(set(ngrams)) / len(ngrams)), 2)
        diversity *= 1 - repetition[size] / 100
    return repetition, diversity


def test_a_text_without_repetition_is_fully_diverse():
    found = measure_diversity("one two three four five six")
    assert found.repetition == {2: 0.0, 3: 0.0, 4: 0.0}
    assert found.diversity == 1.0


def test_every_ngram_counts():
    found = measure_diversity("a b a b a b")
    # 5 bigrams of which 2 differ, 4 trigrams of which 2, 3 four-grams of which 2
    assert found.repetition == {2: 60.0, 3: 50.0, 4: 33.33}
    assert found.diversity == pytest.approx(0.4 * 0.5 * 0.6667)


def test_simctgs_form_leaves_out_the_last_ngram():
    found = measure_diversity("a b a b a b", drop_last_ngram=True)
    assert found.repetition == {2: 50.0, 3: 33.33, 4: 0.0}


@pytest.mark.parametrize("seed", range(5))
def test_simctgs_form_equals_simctg(seed):
    numbers = random.Random(seed)
    text = " ".join(numbers.choice("abcde") for _ in range(numbers.randint(6, 60)))
    found = measure_diversity(text, drop_last_ngram=True)
    repetition, diversity = simctg(text)
    assert found.repetition == repetition
    assert found.diversity == pytest.approx(diversity)


def test_ngrams_repeat_within_a_text_only():
    assert measure_diversity(["a b c d", "a b c d"]).diversity == 1.0


def test_a_text_that_is_too_short_has_no_diversity():
    found = measure_diversity("only three words")
    assert found.repetition[4] is None
    assert found.diversity == 0.0
