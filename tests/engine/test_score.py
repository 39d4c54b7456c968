import pytest

from multiexit_engine import Contrast, Engine, Exit, Original, SamplingParams

MODES = [Original(), Exit(4), Contrast(6, 2), Contrast("original", 2, alpha=0.5)]
TEXT = list(range(60, 90))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_each_position_is_scored_from_its_own_distribution(engine, mode):
    (score,) = engine.score([TEXT], mode)
    logprobs = engine.logits(TEXT[:-1], mode).log_softmax(-1)
    expected = [logprobs[i, token].item() for i, token in enumerate(TEXT[1:])]
    assert score.token_logprobs[0] is None
    assert score.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert score.is_greedy[1:] == [
        int(row.argmax()) == token for row, token in zip(logprobs, TEXT[1:], strict=True)
    ]
    assert score.total == pytest.approx(sum(expected), abs=1e-3)


def test_a_greedy_continuation_is_greedy(engine):
    (output,) = engine.generate([TEXT], SamplingParams(max_new_tokens=5), Contrast(6, 2))
    (score,) = engine.score([(TEXT, output.outputs[0].token_ids)], Contrast(6, 2))
    assert score.is_greedy == [True] * 5


def test_a_continuation_has_the_scores_of_its_part_of_the_whole(engine):
    whole, part = engine.score([TEXT, (TEXT[:20], TEXT[20:])], Exit(4))
    assert part.token_ids == TEXT[20:]
    assert part.token_logprobs == pytest.approx(whole.token_logprobs[20:], abs=1e-5)


def test_texts_and_ids_give_the_same(engine):
    ids = engine.tokenizer("hello world")["input_ids"]
    text, tokens, pair = engine.score(["hello world", ids, ("hello", " world")])
    assert text == tokens
    assert pair.token_ids == ids[5:]


def test_a_text_longer_than_the_model_is_scored_in_windows(folder, engine):
    small = Engine.from_pretrained(folder, dtype="float32", max_model_len=16)
    (score,) = small.score([TEXT], Exit(4), stride=4)
    assert len(score.token_logprobs) == len(TEXT)
    (window,) = engine.score([(TEXT[12:24], TEXT[24:28])], Exit(4))
    assert score.token_logprobs[24:28] == pytest.approx(window.token_logprobs, abs=1e-4)


def test_chunked_scoring_gives_the_same(folder, engine):
    small = Engine.from_pretrained(folder, dtype="float32", max_num_batched_tokens=7)
    (a,), (b,) = engine.score([TEXT], Contrast(6, 2)), small.score([TEXT], Contrast(6, 2))
    assert a.token_logprobs[1:] == pytest.approx(b.token_logprobs[1:], abs=1e-4)


def test_equal_contexts_are_computed_once(folder):
    engine = Engine.from_pretrained(folder, dtype="float32", max_batch_size=1)
    engine.score([(list(range(100)), [i]) for i in range(3)])
    assert engine.stats().prefix_hit_tokens == 2 * 96


@pytest.mark.parametrize("item", ["", [], ("a", [1]), ("a", "b", "c"), ([1], [])])
def test_a_bad_item_is_refused(engine, item):
    with pytest.raises(ValueError, match="items"):
        engine.score([item])


def test_the_first_token_of_a_lone_text_has_no_score(engine):
    (score,) = engine.score([[5]])
    assert (score.token_logprobs, score.total) == ([None], 0)


@pytest.mark.parametrize("step_tokens", [len(TEXT) - 1, (len(TEXT) - 1) // 2, 7, 1])
def test_a_text_whose_last_token_stands_alone_in_a_step_is_scored(engine, folder, step_tokens):
    # its score comes from the token before it, so the last step has nothing left to score
    small = Engine.from_pretrained(
        folder, dtype="float32", device="cpu", max_num_batched_tokens=step_tokens
    )
    assert small.score([TEXT])[0].total == pytest.approx(engine.score([TEXT])[0].total, abs=1e-4)
