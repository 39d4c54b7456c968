"""Books as tokens: read an archive or a folder, filter by a list of titles, tokenise, pack.

It knows text files, byte-level BPE and blocks of token ids. It does not know any model or loss.
"""

from __future__ import annotations

import csv
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
DEMO_TITLES = Path(__file__).with_name("demo_corpus.tsv")

# Byte-order marks, zero-width characters and soft hyphens: invisible leftovers of the sources.
_INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u2060\u00ad"))
# Characters that only occur where UTF-8 was once read as Latin-1.
_MOJIBAKE = frozenset("Ã¦¨¯") | frozenset(map(chr, range(0x80, 0xA0)))
_BOOKS_PER_ENCODING = 16
_BOOKS_PER_HELD_OUT = 50


@dataclass(frozen=True)
class Title:
    """One book of a title list: the file it is in, who wrote it, the year it was published."""

    file: str
    author: str
    title: str
    year: int
    held_out: bool


@dataclass(frozen=True)
class Book:
    """The text of one book; `held_out` books are never trained on."""

    name: str
    text: str
    held_out: bool


def read_titles(path: Path) -> list[Title]:
    """Rows of a tab-separated list with the columns file, author, title, year, split.

    The split is train, held-out or reserve; reserve books are checked titles that are not read.
    """
    with path.open(encoding="utf-8", newline="") as lines:
        return [
            Title(
                file=row["file"],
                author=row["author"],
                title=row["title"],
                year=int(row["year"]),
                held_out=row["split"] == "held-out",
            )
            for row in csv.DictReader(lines, delimiter="\t")
            if row["split"] != "reserve"
        ]


def clean_text(text: str) -> str:
    """Text without invisible characters and without paragraphs of broken encoding."""
    paragraphs = (line.strip() for line in text.translate(_INVISIBLE).splitlines())
    return "\n".join(line for line in paragraphs if line and _MOJIBAKE.isdisjoint(line))


def read_books(source: Path, titles: Sequence[Title] | None = None) -> list[Book]:
    """Books of a folder or a tar archive of .txt files, in the order of their file names.

    With `titles`, exactly those files are read and cleaned, and a missing one raises ValueError.
    Without, every .txt file is read as it is and every fiftieth book, or the last of fewer, is held
    out.
    """
    if titles is None:
        texts = sorted(_read_texts(source))
        period = min(len(texts), _BOOKS_PER_HELD_OUT)
        return [
            Book(name, text, held_out=index % period == period - 1)
            for index, (name, text) in enumerate(texts)
        ]
    texts_found = _read_texts(source, wanted={title.file for title in titles})
    found = {name: clean_text(text) for name, text in texts_found}
    missing = sorted(title.file for title in titles if title.file not in found)
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of {len(titles)} listed books, first {missing[0]!r}; "
            "give the archive that the list was made for, or another list"
        )
    ordered = sorted(titles, key=lambda title: title.file)
    return [Book(title.file, found[title.file], title.held_out) for title in ordered]


def _read_texts(source: Path, wanted: set[str] | None = None) -> Iterator[tuple[str, str]]:
    if source.is_dir():
        for path in source.rglob("*.txt"):
            if wanted is None or path.name in wanted:
                yield path.name, _decoded(path.read_bytes(), path.name)
        return
    if not tarfile.is_tarfile(source):
        raise ValueError(
            f"corpus {source}: neither a folder of .txt files nor a tar archive of them"
        )
    with tarfile.open(source) as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            if not name.endswith(".txt") or (wanted is not None and name not in wanted):
                continue
            content = archive.extractfile(member)
            if content is not None:
                yield name, _decoded(content.read(), name)


def _decoded(content: bytes, name: str) -> str:
    try:
        # a byte-order mark at the start is no text
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not in UTF-8 ({error}): convert it, or leave it out"
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer; `<|endoftext|>` is id 0. It encodes any text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """All texts as one int32 stream [tokens], each followed by `<|endoftext|>`."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT} token; train it with train_tokenizer")
    pieces: list[np.ndarray[tuple[int], np.dtype[np.int32]]] = []
    for start in range(0, len(texts), _BOOKS_PER_ENCODING):
        group = list(texts[start : start + _BOOKS_PER_ENCODING])
        for encoding in tokenizer.encode_batch_fast(group):
            pieces.append(np.array([*encoding.ids, end], dtype=np.int32))
    return torch.from_numpy(np.concatenate(pieces))


class BlockSampler:
    """Blocks [batch, block_size] of a token stream, a function of (seed, step) alone.

    Every epoch visits each block once, in a new order and cut at a new offset, so that no token
    always stands at the same position. Being stateless, it resumes at any step.
    """

    def __init__(self, stream: Tensor, block_size: int, batch_size: int, seed: int) -> None:
        self.blocks_per_epoch = (len(stream) - block_size) // block_size
        if self.blocks_per_epoch < 1:
            raise ValueError(
                f"{len(stream)} tokens of text are too few for blocks of {block_size}; "
                "give more text or a smaller block_size"
            )
        self._stream = stream
        self._block_size = block_size
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.long)

    def batch(self, step: int) -> Tensor:
        """The blocks of one step as int64 on the device of the stream."""
        first = step * self._batch_size
        starts = torch.stack([self._start(first + row) for row in range(self._batch_size)])
        positions = starts[:, None] + torch.arange(self._block_size)
        return self._stream[positions.to(self._stream.device)].long()

    def _start(self, index: int) -> Tensor:
        epoch, place = divmod(index, self.blocks_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            offset = torch.randint(self._block_size, (1,), generator=generator)
            order = torch.randperm(self.blocks_per_epoch, generator=generator)
            self._starts = order * self._block_size + offset
            self._epoch = epoch
        return self._starts[place]


def fixed_blocks(stream: Tensor, block_size: int, limit: int | None = None) -> Tensor:
    """The first blocks [blocks, block_size] of a stream, for measuring; drops the remainder."""
    count = len(stream) // block_size
    count = count if limit is None else min(count, limit)
    if count < 1:
        raise ValueError(f"{len(stream)} held-out tokens are too few for blocks of {block_size}")
    return stream[: count * block_size].view(count, block_size).long()
