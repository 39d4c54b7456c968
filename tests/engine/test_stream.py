import itertools

import pytest

from multiexit_engine import Contrast, FinishReason, SamplingParams


@pytest.mark.parametrize("n", [1, 3])
def test_the_pieces_add_up_to_what_generate_gives(engine, n):
    params = SamplingParams(max_new_tokens=30, temperature=2.0, n=n, seed=3, ignore_eos=True)
    (whole,) = engine.generate("Once", params, Contrast(6, 2))
    texts, ids = [""] * n, [[] for _ in range(n)]
    for chunk in engine.stream("Once", params, Contrast(6, 2)):
        texts[chunk.index] += chunk.text
        ids[chunk.index] += chunk.token_ids
    assert texts == [o.text for o in whole.outputs]
    assert ids == [o.token_ids for o in whole.outputs]


def test_a_stop_string_never_leaks(engine):
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    text = engine.generate("Once", params)[0].outputs[0].text
    stop = text[8:11]
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, stop=(stop,))
    chunks = list(engine.stream("Once", params))
    assert "".join(c.text for c in chunks) == text[: text.index(stop)]
    assert chunks[-1].finish_reason is FinishReason.STOP and chunks[-1].stop_reason == stop
    assert engine.generate("Once", params)[0].outputs[0].text == text[: text.index(stop)]


def test_leaving_the_stream_early_frees_everything(engine):
    stream = engine.stream("Once", SamplingParams(max_new_tokens=50))
    list(itertools.islice(stream, 2))
    stream.close()
    assert not engine.has_unfinished()


def test_beam_search_cannot_be_streamed(engine):
    with pytest.raises(ValueError, match="use generate"):
        engine.stream("Once", SamplingParams(num_beams=2))
