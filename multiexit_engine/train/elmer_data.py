"""Pairs of sentences as batches: files, tokenizer, damage for pre-training, padding.

It knows text, byte-level BPE and token ids. It does not know any model or loss.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from multiexit_engine.train.elmer_network import BEGIN, END, PAD
from multiexit_engine.train.elmer_objectives import PairBatch

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"
_MEAN_SPAN_WORDS = 3.5
_PAIRS_PER_HELD_OUT = 50
# Tokens by which a row's length is blurred before rows are sorted into batches of like lengths.
_LENGTH_BLUR = 4.0

Pair = tuple[str, str]


def read_pairs(files: Sequence[Path]) -> list[Pair]:
    """Lines of source, tab, target; raises ValueError for a line of another form."""
    pairs = []
    for file in files:
        for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
            columns = line.split("\t")
            if len(columns) != 2 or not all(column.strip() for column in columns):
                raise ValueError(
                    f"{file}, line {number}: {len(columns)} columns; a line is source, tab, target"
                )
            pairs.append((columns[0].strip(), columns[1].strip()))
    return pairs


def hold_out(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and every fiftieth pair, or the last of fewer, to measure on."""
    period = min(len(pairs), _PAIRS_PER_HELD_OUT)
    held_out = [place % period == period - 1 for place in range(len(pairs))]
    training = [pair for pair, is_held in zip(pairs, held_out, strict=True) if not is_held]
    return training, [pair for pair, is_held in zip(pairs, held_out, strict=True) if is_held]


def train_pair_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with BART's special tokens: `<mask>` is the last id.

    It puts `<s>` before a text and `</s>` after it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    # as BART's: the mask takes the space before it
    tokenizer.add_special_tokens([AddedToken(MASK, lstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json with BART's special ids; raises ValueError if they are elsewhere."""
    tokenizer = Tokenizer.from_file(str(path))
    found = [tokenizer.token_to_id(token) for token in (*SPECIAL_TOKENS[:3], MASK)]
    wanted = [BEGIN, PAD, END, tokenizer.get_vocab_size() - 1]
    if found != wanted:
        raise ValueError(
            f"{path}: <s>, <pad>, </s> and <mask> have the ids {found}; an ELMER has {wanted}"
        )
    return tokenizer


def damage(text: str, share: float, chooser: random.Random) -> str:
    """A text with its sentences in another order and about `share` of its words hidden.

    Spans of words, of mean length 3.5, become one mask each. Source: RUCAIBox/ELMER's pre-training
    corpus (whole-word infilling, sentence permutation), after BART's (arXiv 1910.13461).
    """
    sentences = re.split(r"(?<=[.!?]) ", text)
    chooser.shuffle(sentences)
    words = " ".join(sentences).split()
    to_hide = round(share * len(words))
    while to_hide > 0:
        span = min(to_hide, max(1, _poisson(_MEAN_SPAN_WORDS, chooser)))
        start = chooser.randrange(max(1, len(words) - span + 1))
        words[start : start + span] = [MASK]
        to_hide -= span
    return " ".join(words)


def _poisson(mean: float, chooser: random.Random) -> int:
    """Arrivals in one unit of time at `mean` a unit."""
    count, elapsed = 0, chooser.expovariate(mean)
    while elapsed < 1.0:
        count += 1
        elapsed += chooser.expovariate(mean)
    return count


def encode_source(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> list[list[int]]:
    """Ids with `<s>` and `</s>`; a longer text loses its end, except `</s>`."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
    return [row if len(row) <= limit else [*row[: limit - 1], END] for row in rows]


def encode_target(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids that end with `</s>`, without `<s>`."""
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [[*encoding.ids, END] for encoding in encodings]


def make_batch(
    sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], lengths: Sequence[int]
) -> PairBatch:
    """Rows of ids, padded; `lengths` are the decoder positions of each row."""
    longest = max(lengths)
    source_ids = _padded(sources)
    labels = torch.full((len(targets), longest), PAD)
    for row, target in enumerate(targets):
        labels[row, : len(target)] = torch.tensor(target)
    return PairBatch(
        source_ids=source_ids,
        source_mask=_mask([len(source) for source in sources]),
        target_mask=_mask(lengths),
        labels=labels,
    )


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def _mask(lengths: Sequence[int]) -> Tensor:
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


class TokenBudgetSampler:
    """Batches of row numbers of like length, a function of (seed, step) alone.

    Every epoch visits each row once. Rows are sorted by their blurred lengths and cut where the
    padded tokens would exceed the budget; then the batches are shuffled.
    """

    def __init__(self, lengths: Sequence[int], batch_tokens: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._first_step = 0
        self._epoch = 0
        self._batches = self._batches_of(0)

    def rows(self, step: int) -> list[int]:
        """The row numbers of one step."""
        if step < self._first_step:
            self._first_step, self._epoch, self._batches = 0, 0, self._batches_of(0)
        while step >= self._first_step + len(self._batches):
            self._first_step += len(self._batches)
            self._epoch += 1
            self._batches = self._batches_of(self._epoch)
        return self._batches[step - self._first_step]

    def _batches_of(self, epoch: int) -> list[list[int]]:
        chooser = random.Random(self._seed * 1_000_003 + epoch)
        blurred = [length + _LENGTH_BLUR * chooser.random() for length in self._lengths]
        batches: list[list[int]] = [[]]
        longest = 0
        for row in sorted(range(len(blurred)), key=blurred.__getitem__):
            longest = max(longest, self._lengths[row])
            if batches[-1] and longest * (len(batches[-1]) + 1) > self._batch_tokens:
                batches.append([])
                longest = self._lengths[row]
            batches[-1].append(row)
        chooser.shuffle(batches)
        return batches
