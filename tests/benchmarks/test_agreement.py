"""Equal tokens, tokens that part within rounding, and tokens of another model."""

import pytest

pytest.importorskip("multiexit_engine._C")
from agreement import common_length, describe
from ways import Way


def way(*tokens):
    return Way("peer", "float32", "original", lambda: None, 1, tokens=list(tokens))


def test_the_common_length_ends_at_the_first_difference():
    assert common_length([1, 2, 3], [1, 2, 4]) == 2


def test_a_shorter_text_agrees_as_far_as_it_goes():
    assert common_length([1, 2, 3], [1, 2]) == 2


def test_equal_tokens_are_called_equal():
    assert describe(way([1, 2]), way([1, 2]), {}) == "equal"


def test_close_top_two_explain_a_difference():
    found = describe(way([1, 2]), way([1, 3]), {(0, 1): 1e-5})
    assert found == "first 1 equal, then top two 1e-05 apart: rounding"


def test_distant_top_two_mean_another_model():
    assert describe(way([1, 2]), way([1, 3]), {(0, 1): 0.5}).endswith("DIFFERS")


def test_of_several_requests_the_equal_ones_are_counted():
    assert describe(way([1], [2]), way([1], [3]), {}) == "1 of 2 equal"
