"""The golden checkpoints for tests that need text: a copy with a tokenizer of bytes."""

import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHECKPOINTS = Path(__file__).with_name("acd") / "checkpoints"
END_OF_TEXT = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token 0 ends a text, tokens 1..256 are bytes; all else decodes to nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {END_OF_TEXT: 0, **{letter: place for place, letter in enumerate(alphabet, 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def checkpoint_with_tokenizer(name: str, parent: Path) -> Path:
    """A copy of a golden checkpoint below ``parent`` that can read and write text."""
    folder = parent / name
    shutil.copytree(CHECKPOINTS / name, folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
