import pytest

from multiexit_engine import Contrast, Exit, FinishReason, SamplingParams


def pieces_of(engine, request_id):
    """All pieces of a request, with whatever runs beside it."""
    pieces = []
    while engine.has_unfinished():
        pieces += [piece for piece in engine.step_pieces() if piece.request_id == request_id]
    return pieces


@pytest.mark.parametrize("streamed", [True, False])
def test_pieces_add_up_to_the_output(engine, streamed):
    params = SamplingParams(
        max_new_tokens=20, temperature=2.0, n=3, seed=5, logprobs=2, prompt_logprobs=1
    )
    (whole,) = engine.generate("Once upon", params, Contrast(6, 2))
    name = engine.add_request("Once upon", params, Contrast(6, 2), streamed=streamed)
    engine.add_request("another", SamplingParams(max_new_tokens=9), Exit(2))
    pieces = pieces_of(engine, name)
    for index, wanted in enumerate(whole.outputs):
        parts = [o for piece in pieces for o in piece.outputs if o.index == index]
        assert "".join(part.text for part in parts) == wanted.text
        assert sum((part.token_ids for part in parts), []) == wanted.token_ids
        assert sum((part.logprobs for part in parts), []) == wanted.logprobs
        assert sum((part.exit_layers for part in parts), []) == wanted.exit_layers
        assert parts[-1].finish_reason is wanted.finish_reason
    assert pieces[0].prompt_logprobs == whole.prompt_logprobs
    assert not any(piece.prompt_logprobs for piece in pieces[1:])
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_text_that_is_not_streamed_comes_with_the_last_piece(engine):
    name = engine.add_request("Once", SamplingParams(max_new_tokens=9), streamed=False)
    *first, last = pieces_of(engine, name)
    assert not any(piece.outputs[0].text for piece in first)
    assert (
        last.outputs[0].text
        == engine.generate("Once", SamplingParams(max_new_tokens=9))[0].outputs[0].text
    )


def test_beams_come_with_the_last_piece(engine):
    params = SamplingParams(max_new_tokens=6, num_beams=3, n=2)
    (whole,) = engine.generate("Once", params)
    name = engine.add_request("Once", params)
    *first, last = pieces_of(engine, name)
    assert not any(piece.outputs for piece in first)
    assert last.outputs == whole.outputs


def test_an_aborted_request_gives_no_further_piece(engine):
    name = engine.add_request("Once", SamplingParams(max_new_tokens=50, ignore_eos=True))
    assert engine.step_pieces()[0].admitted_at is not None
    aborted = engine.abort(name)
    assert aborted.outputs[0].finish_reason is FinishReason.ABORT
    assert not engine._feeds._feeds and not engine.step_pieces()
