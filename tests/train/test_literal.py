from multiexit_engine.train.literal import literal_pairs

COMMON = [("he spake unto them", "he said to them")] * 3


def literal_target(source: str, target: str, min_count: int = 3) -> str:
    """The target of a pair among three in which "spake unto" becomes "said to"."""
    return literal_pairs([*COMMON, (source, target)], min_count)[-1][1]


def test_a_common_substitution_stands_in_the_target() -> None:
    assert literal_target("and God spake unto Moses", "and God said to Moses") == (
        "and God said to Moses"
    )


def test_a_rare_substitution_is_undone() -> None:
    assert literal_target("he spake unto Aaron", "he said to Ahron") == "he said to Aaron"


def test_what_a_pair_leaves_out_or_adds_is_undone() -> None:
    assert literal_target("and he went out from there", "he went very far out from there") == (
        "and he went out from there"
    )


def test_words_that_are_usually_replaced_are_replaced_without_the_pairs_own_word() -> None:
    assert literal_target("they spake unto him in anger", "angry were their words") == (
        "they said to him in anger"
    )


def test_words_that_mostly_stay_are_not_replaced() -> None:
    stays = [("and we spake unto no man", "and we spake unto no man")] * 4
    pairs = [*COMMON, *stays, ("she spake unto me", "her words came")]
    assert literal_pairs(pairs, 3)[-1] == ("she spake unto me", "she spake unto me")


def test_punctuation_is_a_word_and_keeps_its_place() -> None:
    pairs = [("hear: O king", "hear; O king"), ("go: O man", "go; O man")]
    assert literal_pairs(pairs, 2) == pairs


def test_sources_stay_as_they_are() -> None:
    assert [source for source, _ in literal_pairs(COMMON, 1)] == [source for source, _ in COMMON]
