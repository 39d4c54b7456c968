"""The quick way to decode gives what the tokenizer gives, or is not taken."""

import pytest

from multiexit_engine.checkpoint import open_checkpoint, text_decoder
from multiexit_engine.checkpoint.text_decoder import BackendDecoder
from tests.tiny import byte_tokenizer


def demo_tokenizer():
    return open_checkpoint("demo").load_tokenizer()


@pytest.mark.parametrize("make", [byte_tokenizer, demo_tokenizer])
@pytest.mark.parametrize("skip", [True, False])
def test_the_backend_decodes_as_the_tokenizer_does(make, skip):
    tokenizer = make()
    quick = text_decoder(tokenizer)
    assert isinstance(quick, BackendDecoder)
    ids = tokenizer("The old house — 世界 🙂.")["input_ids"] + [tokenizer.eos_token_id]
    for start in range(len(ids)):
        for end in range(start, len(ids) + 1):
            wanted = tokenizer.decode(ids[start:end], skip_special_tokens=skip)
            assert quick.decode(ids[start:end], skip_special_tokens=skip) == wanted


def test_a_tokenizer_that_does_more_is_kept():
    class Loud(type(byte_tokenizer())):
        def _decode(self, *args, **kwargs):
            return super()._decode(*args, **kwargs).upper()

    loud = Loud(tokenizer_object=byte_tokenizer().backend_tokenizer)
    assert text_decoder(loud) is loud


def test_a_tokenizer_that_cleans_up_spaces_is_kept():
    tokenizer = byte_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    assert text_decoder(tokenizer) is tokenizer


def test_no_tokenizer_stays_none():
    assert text_decoder(None) is None
