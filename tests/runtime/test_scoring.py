from hypothesis import given
from hypothesis import strategies as st

from multiexit_engine.request import ScoredToken
from multiexit_engine.runtime.requests.scoring import ScoredText, score_output, windows


@given(st.integers(2, 60), st.integers(0, 59), st.integers(2, 16), st.integers(1, 15) | st.none())
def test_windows_score_each_token_once_and_fit_the_model(length, score_from, limit, stride):
    if score_from >= length or (stride is not None and stride >= limit):
        return
    tokens = list(range(length))
    found = windows(tokens, score_from, limit, stride)
    scored = [t for w in found for t in w.token_ids[w.score_from :]]
    assert scored == tokens[max(score_from, 1) :]
    assert all(len(w.token_ids) <= limit and w.score_from >= 1 for w in found)


def test_a_stride_gives_every_later_window_its_context():
    found = windows(list(range(20)), 0, 8, 2)
    assert all(w.score_from == 6 for w in found[1:])


def test_a_long_context_is_cut_on_the_left():
    (window,) = windows(list(range(20)), 18, 8, None)
    assert window.token_ids == list(range(12, 20))
    assert window.score_from == 6


def test_the_first_token_of_a_text_has_no_log_probability():
    output = score_output(ScoredText([5, 6], 0), [ScoredToken(6, -1.5, 1, True)])
    assert (output.token_logprobs, output.is_greedy, output.total) == (
        [None, -1.5],
        [False, True],
        -1.5,
    )
