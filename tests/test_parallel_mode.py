import pytest

from multiexit_engine import Parallel


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (None, (20,)),
        (7, (7,)),
        (1.0, (10,)),
        (1.1, (11,)),
        (1.11, (12,)),
        (0.01, (1,)),
        ((12, 8, 1.2, 0.8), (8, 12)),
    ],
)
def test_target_lens_of_a_source_of_ten_tokens(length, expected):
    assert Parallel(length=length).target_lens(10, cap=20) == expected


def test_prescribed_layers_give_the_length():
    assert Parallel("prescribed", layers=(2, 1, 2)).target_lens(10, cap=20) == (3,)
