import tarfile
from pathlib import Path

import pytest
import torch

from multiexit_engine.train.corpus import (
    DEMO_TITLES,
    BlockSampler,
    clean_text,
    encode_texts,
    read_books,
    read_titles,
    train_tokenizer,
)
from tests.train.tiny import write_books


def test_every_listed_book_was_published_before_1930() -> None:
    assert max(title.year for title in read_titles(DEMO_TITLES)) < 1930


def test_the_list_holds_books_out() -> None:
    assert sum(title.held_out for title in read_titles(DEMO_TITLES)) == 8


def test_an_archive_and_a_folder_give_the_same_books(tmp_path: Path) -> None:
    folder = write_books(tmp_path / "books")
    archive = tmp_path / "books.tar.xz"
    with tarfile.open(archive, "w:xz") as target:
        target.add(folder, arcname="books")
    assert read_books(archive) == read_books(folder)


def test_a_listed_book_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = write_books(tmp_path / "books")
    with pytest.raises(ValueError, match="Abbie_Farwell_Brown"):
        read_books(folder, read_titles(DEMO_TITLES))


def test_paragraphs_of_broken_encoding_and_invisible_characters_are_dropped() -> None:
    assert clean_text("\ufeffOne\n\nbrokÃ«n\n two\u200b ") == "One\ntwo"


def test_texts_without_a_list_of_titles_are_read_as_they_are(tmp_path: Path) -> None:
    text = "def f():\n    return 'N\u00c3O \u00a8'\n"
    (tmp_path / "code.txt").write_text("\ufeff" + text, encoding="utf-8")
    assert [book.text for book in read_books(tmp_path)] == [text]


def test_a_text_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match="old.txt is not in UTF-8"):
        read_books(tmp_path)


def test_a_trained_tokenizer_encodes_any_text_without_loss() -> None:
    text = "Sea and ships, déjà vu — 海\n  two  spaces\tend "
    tokenizer = train_tokenizer(["the sea and the ships"], vocab_size=280)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_text_ends_with_the_end_token() -> None:
    tokenizer = train_tokenizer(["ab ab ab"], vocab_size=258)
    stream = encode_texts(tokenizer, ["a", "b"])
    a, b = tokenizer.token_to_id("a"), tokenizer.token_to_id("b")
    assert stream.tolist() == [a, 0, b, 0]


def test_an_epoch_visits_every_block_once() -> None:
    sampler = BlockSampler(torch.arange(100), block_size=7, batch_size=13, seed=4)
    assert sampler.blocks_per_epoch == 13
    rows = sampler.batch(0)
    firsts = rows[:, 0].sort().values
    torch.testing.assert_close(firsts, firsts[0] + 7 * torch.arange(13))


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    stream = torch.arange(500)
    walked = BlockSampler(stream, block_size=7, batch_size=5, seed=4)
    for step in range(30):
        walked.batch(step)
    jumped = BlockSampler(stream, block_size=7, batch_size=5, seed=4)
    assert torch.equal(walked.batch(17), jumped.batch(17))


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="too few for blocks of 64"):
        BlockSampler(torch.arange(70), block_size=64, batch_size=1, seed=0)
