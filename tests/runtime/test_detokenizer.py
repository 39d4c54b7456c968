import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multiexit_engine.runtime.requests.detokenizer import Detokenizer
from tests.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()


def encode(text):
    return TOKENIZER(text)["input_ids"]


def pieces(text, stop=(), prompt="Once"):
    detokenizer = Detokenizer(TOKENIZER, encode(prompt), tuple(stop))
    found = []
    for token in encode(text):
        detokenizer.append(token)
        found.append(detokenizer.take())
        if detokenizer.stop_string is not None:
            break
    detokenizer.finish()
    return [*found, detokenizer.take()], detokenizer


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="aé世🙂 b", max_size=20))
def test_pieces_add_up_to_the_text_and_never_show_half_a_character(text):
    found, detokenizer = pieces(text)
    assert "".join(found) == text == detokenizer.text
    assert not any("\ufffd" in piece for piece in found)


def test_an_incomplete_last_character_is_shown_as_replacement_at_the_end():
    detokenizer = Detokenizer(TOKENIZER, encode("x"))
    for token in encode("a世")[:-1]:
        detokenizer.append(token)
    assert detokenizer.take() == "a"
    detokenizer.finish()
    assert detokenizer.take().startswith("\ufffd")


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="ab.", max_size=15), st.text(alphabet="ab.", min_size=1, max_size=3))
def test_no_part_of_a_stop_string_leaks_into_the_stream(text, stop):
    found, detokenizer = pieces(text, [stop])
    assert "".join(found) == text.partition(stop)[0] == detokenizer.text
    assert (detokenizer.stop_string == stop) == (stop in text)


def test_the_earliest_of_several_stop_strings_ends_the_text():
    _, detokenizer = pieces("abcd", ["cd", "bc"])
    assert (detokenizer.text, detokenizer.stop_string) == ("a", "bc")


def test_a_stop_string_in_the_prompt_does_not_count():
    _, detokenizer = pieces("cd", ["bc"], prompt="ab")
    assert detokenizer.stop_string is None


def test_a_stop_string_before_the_least_length_is_text():
    detokenizer = Detokenizer(TOKENIZER, encode("x"), ("a",))
    detokenizer.append(encode("a")[0], may_stop=False)
    detokenizer.append(encode("b")[0])
    detokenizer.finish()
    assert (detokenizer.text, detokenizer.stop_string) == ("ab", None)


@pytest.mark.parametrize("text", ["", "héllo 世界"])
def test_tokens_added_unseen_give_the_same_text(text):
    detokenizer = Detokenizer(TOKENIZER, encode("x"))
    detokenizer.append_unseen(encode(text))
    detokenizer.finish()
    assert detokenizer.text == text
