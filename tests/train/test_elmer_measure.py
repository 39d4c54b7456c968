import pytest

from multiexit_engine.train.elmer_measure import (
    Written,
    collapse_repeats,
    corpus_bleu,
    mean_rouge_l,
    source_length,
    text_figures,
)


def test_bleu_of_a_perfect_corpus_is_100() -> None:
    texts = ["and he went up to the mountain", "they saw the light and were glad"]
    assert corpus_bleu(texts, texts) == pytest.approx(100.0)


def test_bleu_is_the_geometric_mean_of_the_shares_of_n_grams() -> None:
    score = corpus_bleu(["the cat sat on the rug"], ["the cat sat on the mat"])
    assert score == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25, abs=1e-6)


def test_rouge_l_counts_the_longest_common_subsequence() -> None:
    # 3 of 4 words in common on both sides
    assert mean_rouge_l(["police kill the gunman"], ["police killed the gunman"]) == 75.0


def test_the_mean_exit_layer_is_over_tokens_not_over_texts() -> None:
    written = [Written("a b c", [5, 6, 7], [1, 1, 1]), Written("d", [8], [3])]
    assert text_figures(written, ["a b c", "d"]).mean_exit_layer == 1.5


def test_repeated_words_become_one() -> None:
    assert collapse_repeats("the the king king said to to the king") == "the king said to the king"


def test_words_of_another_case_are_no_repeats() -> None:
    assert collapse_repeats("The the") == "The the"


def test_a_length_by_the_source_never_exceeds_the_limit() -> None:
    assert [source_length(1.2, 20)(number, 0) for number in (0, 1, 10, 30)] == [1, 2, 12, 20]
