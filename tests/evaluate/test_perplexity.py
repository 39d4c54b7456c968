"""Perplexity against transformers' own logits."""

import math

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from multiexit_engine import Engine, Exit
from multiexit_engine.evaluate.perplexity import measure_perplexity
from tests.golden.acd_checkpoints import CHECKPOINTS, checkpoint_with_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, twice a day."
LONG_TEXT = " ".join(str(number) for number in range(120))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint_with_tokenizer("gpt2_plain", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def token_logprobs(folder):
    """Log-probabilities of a text's tokens after the beginning-of-text token, by transformers."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def of_window(ids):
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return logits.gather(-1, torch.tensor(ids)[1:, None])[:, 0]

    def compute(text, stride=127):
        ids = [0, *tokenizer(text)["input_ids"]]
        parts, end = [of_window(ids[:128])], 128
        while end < len(ids):
            start, end = end, min(end + stride, len(ids))
            parts.append(of_window(ids[end - 128 : end])[start - end :])
        return torch.cat(parts)

    return compute


def test_all_tokens_after_the_first_one_are_scored_once(engine, token_logprobs):
    wanted = token_logprobs(TEXT)
    found = measure_perplexity(engine, TEXT)
    assert found.num_tokens == len(wanted)
    assert found.total_logprob == pytest.approx(wanted.sum().item(), abs=1e-3)
    assert found.per_token == pytest.approx(math.exp(-wanted.mean().item()), rel=1e-4)


def test_words_and_bytes_share_the_same_total(engine):
    found = measure_perplexity(engine, TEXT)
    assert found.num_words == 12
    assert found.num_bytes == len(TEXT)
    assert found.per_word == pytest.approx(math.exp(-found.total_logprob / 12))
    assert found.bits_per_byte == pytest.approx(-found.total_logprob / len(TEXT) / math.log(2))


@pytest.mark.parametrize("stride", [None, 17, 64])
def test_a_long_text_is_scored_in_windows(engine, token_logprobs, stride):
    """The first window is full; each later one scores ``stride`` tokens after 128 - stride."""
    found = measure_perplexity(engine, LONG_TEXT, stride=stride)
    wanted = token_logprobs(LONG_TEXT, stride or 127)
    assert found.num_tokens == len(LONG_TEXT) == len(wanted)
    assert found.total_logprob == pytest.approx(wanted.sum().item(), abs=1e-2)


def test_an_empty_text_is_refused(engine):
    with pytest.raises(ValueError, match="text is empty"):
        measure_perplexity(engine, "")


def test_a_checkpoint_without_tokenizer_is_refused():
    engine = Engine.from_pretrained(CHECKPOINTS / "gpt2_layer", device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="no tokenizer"):
        measure_perplexity(engine, TEXT)


def test_an_exit_has_a_perplexity_of_its_own(folder):
    engine = Engine.from_pretrained(
        folder, dtype="float32", device="cpu", vocab_projection_mode="shared_projection_direct"
    )
    assert measure_perplexity(engine, TEXT, Exit(2)) != measure_perplexity(engine, TEXT)
